from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from strategies.errors import ConfigError
from trainer.data.tokenizers import ByteTokenizer
from trainer.models.hf import Attention, HFModel, Objective
from trainer.models.lora import LoRA
from trainer.models.tasks import ClassificationTask, MaskedTask, Seq2SeqTask
from trainer.optim import AdamWOptimizer

MakeTiny = Callable[..., HFModel]
RNG = np.random.default_rng(0)


class BigTokenizer(ByteTokenizer):  # type: ignore[misc]
    @property
    def vocabulary_size(self) -> int:
        return 1000


def made(model: HFModel, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return model.make()


def saved(model: HFModel, folder: Path) -> nn.Module:
    module = made(model)
    module.save_pretrained(folder)
    model.save_config(folder)
    return module


def loss_of(model: HFModel, module: nn.Module, samples: list[Any]) -> torch.Tensor:
    task = model.task()
    batch = task.collate(samples, list(range(len(samples))))
    return task.loss(module(**batch.inputs), batch).loss / batch.num_targets


def test_import_is_cheap() -> None:
    code = "import sys, trainer.models, trainer.optim; print({'transformers', 'peft', 'datasets'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither path nor architecture"),
        ({"path": "a", "architecture": "llama"}, "both given"),
        ({"architecture": "llama", "loss_chunk": -1}, r"model\.loss_chunk"),
        ({"architecture": "llama", "noise": 0.0}, r"model\.noise"),
        ({"architecture": "llama", "num_labels": 3}, r"num_labels=3 means nothing for objective=causal"),
        ({"architecture": "llama", "objective": Objective.classification}, "num_labels=None"),
        (
            {"architecture": "llama", "objective": Objective.classification, "num_labels": 2, "loss_chunk": 8},
            "not for classification",
        ),
    ],
)
def test_model_with_contradicting_settings_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HFModel(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "lama"}, r"architecture=lama is not a model type.*llama.*\(model\.architecture\)"),
        (
            {"architecture": "llama", "config": {"hiden_size": 32}},
            r"LlamaConfig has no field 'hiden_size'. Nearest: hidden_size.*\(model\.config\.hiden_size\)",
        ),
        ({"architecture": "llama", "config": {"hidden_size": "x"}}, r"'hidden_size' expected int.*\(model\.config\)"),
        (
            {"architecture": "llama", "config": {"hidden_size": 100, "num_attention_heads": 3}},
            r"100\) is not a multiple of the number of attention heads \(3\).*\(model\.config\)",
        ),
        ({"architecture": "llama", "objective": Objective.masked}, r"llama has no model for objective=masked"),
        ({"architecture": "llama", "config": {"vocab_size": 100}}, r"tokenizer has 259 tokens.*vocabulary 100"),
        ({"architecture": "gemma2", "attention": Attention.sdpa}, r"gemma2 can't be made.*\(model\)"),
        ({"path": "/nowhere/at/all"}, r"'/nowhere/at/all' can't be opened.*\(model\.path\)"),
    ],
)
def test_prepare_refuses_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HFModel(**fields).prepare(ByteTokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_flash_attention_without_cuda_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flash_attention_2 needs a CUDA device.*\(model\.attention\)"):
        HFModel(architecture="llama", attention=Attention.flash_attention_2)


@pytest.mark.parametrize("fields", [{"rank": -1}, {"alpha": 0.0, "rank": 1}, {"dropout": 1.0, "rank": 1}])
def test_lora_with_value_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"model\.lora\.{next(iter(fields))}"):
        LoRA(**fields)


@pytest.mark.parametrize("fields", [{"dropout": 0.1}, {"target_modules": ["q_proj"]}])
def test_lora_with_settings_but_no_rank_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"while rank is 0.*\(model\.lora\.rank\)"):
        LoRA(**fields)


def test_lora_with_unknown_modules_is_refused(tiny: MakeTiny) -> None:
    with pytest.raises(ConfigError, match=r"LoRA: .*nothing_here.*\(model\.lora\.target_modules\)") as caught:
        tiny("llama", lora=LoRA(rank=2, target_modules=["nothing_here"]))
    assert "\n" not in str(caught.value)


# What follows from the tokenizer.


def test_prepare_fits_vocabulary_and_special_tokens(tiny: MakeTiny, tmp_path: Path) -> None:
    module = made(tiny("llama"))
    assert module.get_input_embeddings().weight.shape == (259, 32)
    tiny("llama").save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 256, 257)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"


def test_prepare_keeps_a_larger_vocabulary_that_was_asked_for(tiny: MakeTiny) -> None:
    module = made(tiny("llama", config={"vocab_size": 320}))
    assert module.get_input_embeddings().weight.shape == (320, 32)


def test_spare_tokens_at_the_end_of_the_vocabulary_are_sentinels(tiny: MakeTiny) -> None:
    task = tiny("t5", config={"vocab_size": 264}).task()
    assert isinstance(task, Seq2SeqTask)
    assert task.sentinels == (263, 262, 261, 260, 259)
    assert task.start == 257
    plain = tiny("t5").task()
    assert isinstance(plain, Seq2SeqTask)
    assert plain.sentinels == ()


def test_positions_counted_from_behind_the_padding_token_are_not_all_usable(tiny: MakeTiny) -> None:
    model = tiny("roberta")  # 300 positions, and bytes are padded with token 257
    task = model.task()
    assert isinstance(task, MaskedTask)
    assert task.limit == 42
    batch = task.collate([{"tokens": np.arange(42)}], [0])
    assert made(model)(**batch.inputs).logits.shape == (1, 42, 259)
    with pytest.raises(ConfigError, match="no position is left"):
        tiny("roberta", config={"max_position_embeddings": 258})


def test_make_with_fresh_weights_needs_no_network(monkeypatch: pytest.MonkeyPatch, tiny: MakeTiny) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for architecture in ("llama", "t5", "bert"):
        made(tiny(architecture))


def test_make_says_nothing(tiny: MakeTiny, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    made(tiny("gpt2", lora=LoRA(rank=2)))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert caplog.records == []


# Pretrained weights.


def test_make_from_a_folder_has_its_weights_in_fp32(tiny: MakeTiny, tmp_path: Path) -> None:
    module = saved(tiny("llama"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16"}))
    model = HFModel(path=str(tmp_path))
    model.prepare(ByteTokenizer())
    found = made(model, seed=9)
    assert {value.dtype for value in found.parameters()} == {torch.float32}
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert model.weights(0).folder == tmp_path


@pytest.mark.parametrize("lora", [LoRA(), LoRA(rank=2)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fill_from_a_folder_equals_make(tiny: MakeTiny, tmp_path: Path, architecture: str, lora: LoRA) -> None:
    saved(tiny(architecture), tmp_path)
    model = HFModel(path=str(tmp_path), lora=lora)
    model.prepare(ByteTokenizer())
    expected = made(model, seed=4)
    with torch.device("meta"):
        found = model.make()
    found.to_empty(device="cpu")
    model.weights(4).fill(found)
    left, right = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (expected, found))
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_prepare_with_overrides_of_a_folder_keeps_the_rest(tiny: MakeTiny, tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path)
    model = HFModel(path=str(tmp_path), config={"attention_dropout": 0.5})
    model.prepare(ByteTokenizer())
    module = made(model)
    assert module.config.attention_dropout == 0.5
    assert module.config.hidden_size == 32


def test_prepare_with_a_tokenizer_larger_than_the_embedding_is_refused(tiny: MakeTiny, tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer has 1000 tokens and the model's vocabulary 259"):
        HFModel(path=str(tmp_path)).prepare(BigTokenizer())


def test_classifier_on_a_pretrained_model_has_a_head_from_the_seed(tiny: MakeTiny, tmp_path: Path) -> None:
    saved(tiny("llama"), tmp_path)
    model = HFModel(path=str(tmp_path), objective=Objective.classification, num_labels=3)
    model.prepare(ByteTokenizer())
    one, two = made(model, seed=1), made(model, seed=1)
    assert torch.equal(one.score.weight, two.score.weight)
    assert one.score.weight.shape == (3, 32)


# Training.


def steps(model: HFModel, module: nn.Module, samples: list[Any], count: int) -> list[float]:
    optimizer = AdamWOptimizer(lr=1e-2).make(module.named_parameters())
    losses = []
    for _ in range(count):
        loss = loss_of(model, module, samples)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_samples(count: int = 4, **more: Any) -> list[Any]:
    return [{"tokens": RNG.integers(0, 256, 24), **more} for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5", "mixtral"])
def test_model_learns_its_samples(tiny: MakeTiny, architecture: str) -> None:
    model = tiny(architecture)
    losses = steps(model, made(model).train(), plain_samples(), 12)
    assert losses[-1] < losses[0] - 0.5


def test_classifier_learns_its_samples(tiny: MakeTiny) -> None:
    model = tiny("bert", objective=Objective.classification, num_labels=2)
    samples = [{"tokens": RNG.integers(0, 256, 8 + 8 * label), "label": label} for label in (0, 1, 0, 1)]
    assert isinstance(model.task(), ClassificationTask)
    losses = steps(model, made(model).train(), samples, 12)
    assert losses[-1] < 0.3


def test_lora_on_messages_trains_only_the_adapters(tiny: MakeTiny) -> None:
    model = tiny("llama", lora=LoRA(rank=4, alpha=16, dropout=0.1))
    module = made(model).train()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    answers = np.arange(24) >= 12
    losses = steps(model, module, plain_samples(counts=answers), 30)
    assert losses[-1] < losses[0] - 0.3
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert sum(value.requires_grad for value in module.parameters()) == len(changed)


def test_lora_starts_where_the_frozen_model_is(tiny: MakeTiny) -> None:
    plain, adapted = tiny("llama"), tiny("llama", lora=LoRA(rank=4))
    samples = plain_samples()
    assert torch.equal(loss_of(plain, made(plain), samples), loss_of(adapted, made(adapted), samples))


def test_lora_config_is_saved_beside_the_models(tiny: MakeTiny, tmp_path: Path) -> None:
    tiny("llama", lora=LoRA(rank=4, target_modules=["q_proj"])).save_config(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["r"], raw["target_modules"]) == (4, ["q_proj"])


def test_experts_balance_is_part_of_the_loss(tiny: MakeTiny) -> None:
    model = tiny("mixtral", config={"router_aux_loss_coef": 0.5})
    task, module = model.task(), made(model)
    batch = task.collate(plain_samples(), [0] * 4)
    terms = task.loss(module(**batch.inputs), batch)
    assert terms.auxiliary is not None
    assert terms.auxiliary.item() > 0.5  # 0.5 times at least 1
    terms.auxiliary.backward()
    router = [p.grad for name, p in module.named_parameters() if "mlp.gate" in name]
    assert router
    assert all(value is not None for value in router)


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5"])
def test_dropout_of_the_configuration_is_respected(tiny: MakeTiny, architecture: str) -> None:
    off = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "t5": {"dropout_rate": 0.0},
    }[architecture]
    samples = plain_samples()
    for config, same in (({}, False), (off, True)):
        model = tiny(architecture, config=config)
        module = made(model).train()
        assert (loss_of(model, module, samples).item() == loss_of(model, module, samples).item()) is same
