"""`shardwright export`: what it writes is what was trained, for every kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.trainer.jobs import ROWS, TINY, fit, losses
from trainer.checkpoint import Record
from trainer.commands.card import card
from trainer.commands.export import export

T5 = ("model=t5_small", "model.config.d_model=16", "model.config.d_kv=8", "model.config.d_ff=32",
      "model.config.num_layers=2", "model.config.num_heads=2", "model.config.vocab_size=300")  # fmt: skip
GPT2 = ("model=hf", "model.architecture=gpt2", "model.config.n_embd=16", "model.config.n_layer=2",
        "model.config.n_head=2", "model.config.n_positions=64")  # fmt: skip
MODEL = tuple(word for word in TINY if word.startswith("model."))
SHORT = ("trainer.max_steps=4", "trainer.eval_samples=2")


def trained(workers: Workers, folder: Path, *overrides: str, trainer: str = "Trainer", size: int = 1) -> None:
    base = [word for word in TINY if not (word.startswith("model.") and any(w.startswith("model=") for w in overrides))]
    start = list(ROWS) if trainer == "Rows" else base
    for answer in workers.run(fit, size, str(folder), [*start, *SHORT, *overrides], trainer):
        assert "error" not in answer, answer


def expected(folder: Path, kind: str = "weights") -> torch.nn.Module:
    """The module as training had it, by another way than export's: made with storage, filled by name."""
    from strategies.world import Launch, World, open_store
    from trainer.checkpoint import Checkpointer, Checkpoints
    from trainer.config import restored
    from trainer.data import make_tokenizer
    from trainer.models import HFModel

    keeper = Checkpointer(
        str(folder / "checkpoints"), World(device=torch.device("cpu"), store=open_store(Launch())), Checkpoints()
    )
    found = keeper.newest()
    assert found is not None
    record = keeper.read_record(found)
    model = restored(HFModel, record.config["model"])
    model.prepare(make_tokenizer("bytes"))
    module = model.make()
    mine = {name: value for name, value in module.state_dict().items() if name not in record.aliases}
    for value in mine.values():
        value.zero_()
    keeper.load(found, {f"{kind}/{name}": value for name, value in mine.items()})
    assert any(value.any() for value in mine.values())
    return module.eval()


def logits(module: Any, seq2seq: bool = False) -> torch.Tensor:
    tokens = torch.tensor([list(b"def main():")])
    with torch.no_grad():
        found: torch.Tensor = module(tokens, **({"decoder_input_ids": tokens} if seq2seq else {})).logits
    return found


@pytest.mark.parametrize(
    ("overrides", "opener"),
    [
        ((), "AutoModelForCausalLM"),
        (GPT2, "AutoModelForCausalLM"),
        (T5, "AutoModelForSeq2SeqLM"),
        (("model.lora.rank=2", "optimizer.lr=1e-1"), "AutoModelForCausalLM"),
        (("model.loss_chunk=8", "precision=fp64"), "AutoModelForCausalLM"),
    ],
    ids=["llama_tiny", "gpt2_tied", "t5", "lora", "chunked"],
)
def test_export_opened_by_transformers_gives_the_same_logits(
    workers: Workers, tmp_path: Path, overrides: tuple[str, ...], opener: str
) -> None:
    import transformers

    trained(workers, tmp_path / "run", *overrides)
    assert export(tmp_path / "run", tmp_path / "out") == 4
    opened = getattr(transformers, opener).from_pretrained(tmp_path / "out").eval()
    seq2seq = opener.endswith("Seq2SeqLM")
    assert torch.allclose(logits(opened, seq2seq), logits(expected(tmp_path / "run"), seq2seq), atol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "größe = 'x'\n\t# \x00 ☃"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert opened.config.use_cache


@pytest.mark.parametrize(
    ("size", "overrides"),
    [(3, ()), (2, ("model.lora.rank=2", "optimizer.lr=1e-1")), (2, GPT2)],
    ids=["3", "2_lora", "2_tied"],
)
def test_export_of_a_sharded_run_in_several_files_gives_the_same_logits(
    workers: Workers, tmp_path: Path, size: int, overrides: tuple[str, ...]
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trained(workers, tmp_path / "run", "strategy=fsdp_full", *overrides, size=size)
    export(tmp_path / "run", tmp_path / "out", max_shard_size="10KB")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(value.numel() * 4 for value in held.values()) <= 10_000
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(opened), logits(expected(tmp_path / "run")), atol=1e-5)


def test_export_stores_experts_as_others_do(workers: Workers, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    words = ("model=hf", "model.architecture=mixtral", "model.config.num_local_experts=2", *MODEL)
    trained(workers, tmp_path / "run", *words)
    export(tmp_path / "run", tmp_path / "out", max_shard_size="10KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.1.w2.weight" in index["weight_map"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(opened), logits(expected(tmp_path / "run")), atol=1e-5)


def test_an_exported_model_is_where_every_strategy_starts_from(workers: Workers, tmp_path: Path) -> None:
    """The first loss of the new run is the validation loss' neighbour of the old: no step is lost on the way."""
    trained(workers, tmp_path / "run", "strategy=fsdp_full", size=2)
    export(tmp_path / "run", tmp_path / "out", max_shard_size="10KB")
    base = [word for word in TINY if not word.startswith("model.")]
    begun = [*base, *SHORT, "model=hf", f"model.path={tmp_path / 'out'}", "trainer.micro_batch=1"]
    first = []
    for strategy, size in (("single", 1), ("ddp", 2), ("fsdp_full", 2), ("fsdp_full", 3), ("fsdp_hybrid", 4)):
        folder = tmp_path / f"{strategy}{size}"
        for answer in workers.run(fit, size, str(folder), [*begun, f"strategy={strategy}"], local_size=min(size, 2)):
            assert "error" not in answer, answer
        first.append(losses(folder)[0])
    assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    fresh = losses(tmp_path / "run")
    assert first[0] < fresh[-1] + 0.02 < fresh[0], "it starts where the other had come"


def test_export_card_says_what_it_is(workers: Workers, tmp_path: Path) -> None:
    trained(workers, tmp_path / "run", "trainer.ema_decay=0.9", "model.lora.rank=2", "trainer.eval_every=2")
    export(tmp_path / "run", tmp_path / "out", average=True)
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "shardwright"],
    }
    for words in ("# run", "`LlamaForCausalLM` of 13,488 parameters", "| steps | 4 |", "| global batch | 12 |"):
        assert words in text, words
    for words in ("LoRA of rank 2, merged", "running average", "val_loss", "AutoModelForCausalLM.from_pretrained"):
        assert words in text, words
    assert str(tmp_path) not in text


def test_export_that_cannot_be_written_leaves_nothing(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(workers, tmp_path / "run")
    (tmp_path / "out").mkdir()

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for size in ("", "many", "0MB", "-1GB", "5"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            export(tmp_path / "run", tmp_path / "out", max_shard_size=size)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            export(tmp_path / "run", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert export(tmp_path / "run", tmp_path / "out") == 4


def test_export_average_is_another_model(workers: Workers, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained(workers, tmp_path / "run", "trainer.ema_decay=0.9")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    export(checkpoint, tmp_path / "plain")
    export(checkpoint, tmp_path / "average", average=True)
    plain, average = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("plain", "average"))
    assert torch.allclose(plain, logits(expected(tmp_path / "run")), atol=1e-6)
    assert torch.allclose(average, logits(expected(tmp_path / "run", "average")), atol=1e-6)
    assert not torch.allclose(plain, average, atol=1e-4)


def test_export_mixture_brings_its_sources_tokenizer(workers: Workers, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = next(word for word in TINY if word.startswith("data.paths")).replace("data.", "data.sources.code.")
    mixture = ("data=mixture", "data@data.sources.code=text", source, "data.sources.code.length=16")
    words = [word for word in TINY if not word.startswith("data")]
    [answer] = workers.run(fit, 1, str(tmp_path / "run"), [*words, *SHORT, *mixture])
    assert "error" not in answer, answer
    export(tmp_path / "run", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab", add_special_tokens=False)["input_ids"] == [97, 98]


def test_export_refusals_leave_everything_as_it_was(workers: Workers, tmp_path: Path) -> None:
    trained(workers, tmp_path / "run")
    trained(workers, tmp_path / "own", trainer="Rows")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for source, target, average, word in [
        ("run", "used", False, "nothing is overwritten"),
        ("run", "file", False, "nothing is overwritten"),
        ("run", "file/below", False, "can't be written"),
        ("run", "new", True, "trainer.ema_decay"),
        ("own", "new", False, "Trainer subclass"),
        ("empty", "new", False, "no complete checkpoint"),
        ("nowhere", "new", False, "no complete checkpoint"),
        ("used", "new", False, "no complete checkpoint"),
    ]:
        with pytest.raises(ConfigError, match=word) as caught:
            export(tmp_path / source, tmp_path / target, average=average)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists(), source
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("image_classification", ["image-classification", "AutoImageProcessor", "AutoModelForImageClassification"]),
        ("seq2seq", ["text2text-generation", "AutoTokenizer", "AutoModelForSeq2SeqLM"]),
    ],
)
def test_card_says_how_the_model_is_opened(objective: str, words: list[str]) -> None:
    record = Record(
        progress={"step": 1, "samples": 2, "tokens": 3}, world_size=1, config={"model": {"objective": objective}}
    )
    module = torch.nn.Linear(1, 1)
    module.config = SimpleNamespace(model_type="vit")  # type: ignore[assignment]
    text = card(record, module, "weights")
    assert all(word in text for word in words), text
