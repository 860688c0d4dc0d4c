"""First values on every rank, fresh and stored: what one process would have, bit for bit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD

from strategies.backends import GlooBackend
from strategies.base import NamedParameters, Plan
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.testing import Workers
from tests.trainer.models.conftest import CONFIGS
from trainer.data.tokenizers import ByteTokenizer
from trainer.models.hf import HFModel, Objective
from trainer.models.lora import LoRA

MakeTiny = Callable[..., HFModel]
UNEVEN = {"hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
HYBRID = {"sharding": Sharding.hybrid, "shard_size": 2}


def model_of(fields: dict[str, Any]) -> HFModel:
    model = HFModel(**fields)
    model.prepare(ByteTokenizer())
    return model


def sgd(named: NamedParameters) -> SGD:
    return SGD([value for _, value in named], lr=0.1)


def different(settings: dict[str, Any], cases: list[dict[str, Any]], whole: bool = False) -> list[list[str]]:
    """Of each model, the values (buffers too) that differ between a sharded start and `make` in one process."""
    strategy = FSDPStrategy(**settings)
    world = strategy.connect(GlooBackend())
    plan = Plan(micro_batch=1, deferred=True)
    found = []
    for fields in cases:
        model = model_of(fields)
        torch.manual_seed(11)
        expected = model.make()
        torch.manual_seed(100 + world.rank)  # the global stream mustn't matter
        with strategy.init_context(plan):
            module = model.make()
        unread = mock.patch.object(HFModel, "_load", side_effect=AssertionError("loaded whole"))
        with contextlib.nullcontext() if whole else unread:
            module, _ = strategy.setup(module, model.weights(11), sgd, plan)
        found.append(compared(expected, module))
    strategy.close()
    return found


def compared(expected: nn.Module, found: nn.Module) -> list[str]:
    left, right = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (expected, found))
    assert list(left) == list(right)
    wrong = []
    for name, value in left.items():
        other: Any = right[name]
        gathered = other.full_tensor() if hasattr(other, "full_tensor") else other
        if not torch.equal(value, gathered):
            wrong.append(name)
    return wrong


FRESH: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "config": {**UNEVEN, "num_key_value_heads": 1}},
    "tied": {"architecture": "llama", "config": {**CONFIGS["llama"], "tie_word_embeddings": True}},
    "lora": {"architecture": "llama", "config": CONFIGS["llama"], "lora": LoRA(rank=3)},
    "t5": {"architecture": "t5", "config": CONFIGS["t5"], "objective": Objective.seq2seq},
    "bert": {"architecture": "bert", "config": CONFIGS["bert"], "objective": Objective.masked},
    **{name: {"architecture": name, "config": CONFIGS[name]} for name in ("gpt2", "opt", "mixtral", "bloom", "mamba")},
}


@pytest.mark.parametrize(
    ("size", "settings", "names"),
    [(2, {}, list(FRESH)), (3, {}, ["llama", "t5", "mixtral"]), (4, {}, ["llama", "gpt2"]), (4, HYBRID, ["llama"])],
    ids=["2", "3", "4", "hybrid"],
)
def test_fresh_weights_of_a_sharded_run_are_those_of_one_process(
    workers: Workers, size: int, settings: dict[str, Any], names: list[str]
) -> None:
    for found in workers.run(different, size, settings, [FRESH[name] for name in names]):
        assert dict(zip(names, found, strict=True)) == {name: [] for name in names}


def save(folder: Path, kind: str, seed: int = 3, **options: Any) -> Any:
    """A stored model of the kinds above, with values of its own also where fresh ones are ones or zeros."""
    model = model_of(FRESH[kind])
    torch.manual_seed(seed)
    module: Any = model.make()
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.rand_like(value) / 10)
    module.save_pretrained(folder, **options)
    return module


def headless(folder: Path) -> None:
    """As the base model alone is stored: names without its prefix."""
    save(folder, "llama").model.save_pretrained(folder)


def with_head_only(folder: Path) -> None:
    """Tied weights under the name that isn't theirs in the model."""
    save(folder, "tied")
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


STORED: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "plain": (lambda folder: save(folder, "llama"), {}),
    "shards": (lambda folder: save(folder, "llama", max_shard_size="20KB"), {}),
    "bf16": (lambda folder: save(folder, "llama").bfloat16().save_pretrained(folder), {}),
    "tied": (lambda folder: save(folder, "gpt2"), {}),
    "with_head_only": (with_head_only, {}),
    "experts": (lambda folder: save(folder, "mixtral"), {}),
    "t5": (lambda folder: save(folder, "t5"), {"objective": Objective.seq2seq}),
    "masked": (lambda folder: save(folder, "bert"), {"objective": Objective.masked}),
    "buffers": (lambda folder: save(folder, "mamba"), {}),
    "headless": (headless, {}),
    "new_head": (
        lambda folder: save(folder, "llama"),
        {"objective": Objective.classification, "num_labels": 5},
    ),
    "lora": (lambda folder: save(folder, "llama"), {"lora": LoRA(rank=3)}),
    "lora_tied": (lambda folder: save(folder, "gpt2"), {"lora": LoRA(rank=3)}),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each kind, what makes the model from its folder."""
    folder = tmp_path_factory.mktemp("stored")
    for name, (write, _) in STORED.items():
        (folder / name).mkdir()
        write(folder / name)
    return {name: {"path": str(folder / name), **fields} for name, (_, fields) in STORED.items()}


@pytest.mark.parametrize(
    ("size", "settings", "names"),
    [(3, {}, list(STORED)), (2, {}, ["plain", "experts", "lora"]), (4, HYBRID, ["plain", "tied", "new_head"])],
    ids=["3", "2", "hybrid"],
)
def test_stored_weights_of_a_sharded_run_are_read_in_parts_and_equal_those_of_one_process(
    workers: Workers, stored: dict[str, dict[str, Any]], size: int, settings: dict[str, Any], names: list[str]
) -> None:
    for found in workers.run(different, size, settings, [stored[name] for name in names]):
        assert dict(zip(names, found, strict=True)) == {name: [] for name in names}


def test_stored_experts_are_of_another_layout_than_the_models(stored: dict[str, dict[str, Any]]) -> None:
    names = load_file(Path(stored["experts"]["path"]) / "model.safetensors")
    assert any("experts.0.w1" in name for name in names)
    with torch.device("meta"):
        assert not any("experts.0" in name for name in model_of(stored["experts"]).make().state_dict())


def as_old_format(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_other_formats_are_loaded_whole_and_the_log_says_so(workers: Workers, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    as_old_format(tmp_path)
    for found, said in workers.run(different_and_said, 2, [{"path": str(tmp_path)}]):
        assert found == [[]]
        assert len(said) == 1
        assert "every process loads the whole of" in said[0]


def different_and_said(cases: list[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("shardwright.models")
    logger.addHandler(handler)
    try:
        return different({}, cases, whole=True), heard
    finally:
        logger.removeHandler(handler)


def refusal(fields: dict[str, Any]) -> str:
    model = model_of(fields)
    with torch.device("meta"):
        module = model.make()
    module.to_empty(device="cpu")
    with pytest.raises(ConfigError) as caught:
        model.weights(0).fill(module)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    save(tmp_path / "short", "llama")
    whole = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(whole[:-100])
    assert "can't be made" in refusal({"path": str(tmp_path / "short")})
    save(tmp_path / "gap", "llama", max_shard_size="20KB")
    next((tmp_path / "gap").glob("model-00002*")).unlink()
    assert "model-00002" in refusal({"path": str(tmp_path / "gap")})
    save(tmp_path / "other", "llama")
    assert "can't be made" in refusal({"path": str(tmp_path / "other"), "config": {"intermediate_size": 38}})
    save(tmp_path / "apart", "tied")
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
              tmp_path / "apart" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    assert "tie_word_embeddings=false" in refusal({"path": str(tmp_path / "apart")})


def test_a_name_on_the_hub_is_read_in_parts_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for kind, limit in (("whole", "1GB"), ("cut", "20KB")):
        repository = tmp_path / f"models--some--{kind}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        save(repository / "snapshots" / "abc", "llama", max_shard_size=limit)
        model = model_of({"path": f"some/{kind}"})
        expected = model.make()
        with torch.device("meta"):
            module = model.make()
        module.to_empty(device="cpu")
        with mock.patch.object(HFModel, "_load", side_effect=AssertionError("loaded whole")):
            model.weights(0).fill(module)
        assert compared(expected, module) == []
