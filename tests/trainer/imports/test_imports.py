"""Checkpoints that DeepSpeed and Accelerate wrote are read in, and training goes on here as it would have there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.testing import Workers
from tests.trainer.commands.jobs import ROOT, command
from tests.trainer.imports.job import AFTER, BEFORE, GLOBAL_BATCH, WORDS, go_on, model
from tests.trainer.jobs import losses, record_of
from trainer.checkpoint.metadata import IndexReader
from trainer.checkpoint.store import FolderStore

MINE = ("--trainer", str(Path(__file__).with_name("job.py")) + ":Comer")
LIKE_THERE = 5e-6
"""How far losses may be apart after the move, in fp32."""

MOVES = {
    "zero0": ("single", 1, ()),
    "zero1": ("fsdp_full", 2, ()),
    "zero2": ("ddp", 2, ()),
    "zero3": ("fsdp_grad_op", 2, ()),
    "ddp": ("fsdp_replicate", 2, ()),
    "ddp_bin": ("single", 1, ("optimizer.weight_decay=0",)),
    "fsdp": ("ddp", 1, ()),
    "fsdp1": ("single", 1, ("optimizer.weight_decay=0",)),  # it made all parameters flat, so none of them decayed
    "fsdp_full": ("fsdp_full", 1, ()),
}
"""Case -> where it goes on: strategy, ranks, further words."""
pytestmark = pytest.mark.timeout(600)  # the plain loops import more than all the rest
WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
MIXED = ("zero0_bf16", "zero1_bf16", "zero2_fp16", "zero3_bf16")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case of `others.py`, written in one launch."""
    folder = tmp_path_factory.mktemp("others")
    pytest.importorskip("accelerate")
    names = [name for name in (*MOVES, *MIXED) if not name.startswith("zero") or WITH_DEEPSPEED]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))
    done = subprocess.run(
        [*launch, "-m", "tests.trainer.imports.others", str(folder), *names],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def needs_library(case: str) -> None:
    if case.startswith("zero") and not WITH_DEEPSPEED:
        pytest.skip("DeepSpeed isn't installed")


def read_in(source: Path, run: Path, *words: str) -> tuple[int, str, str]:
    return command(["import-checkpoint", str(source), f"run.dir={run}", *MINE, *WORDS, *words])


def tensors_of(run: Path, step: int = BEFORE) -> dict[str, Tensor]:
    """All tensors of a run's checkpoint."""
    (folder,) = (run / "checkpoints" / f"step-{step:08d}").glob("*/tensors")
    reader = IndexReader(FolderStore(folder.parent), folder.name)
    index = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader.read(found)
    return found


def told_of(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


@pytest.mark.parametrize("case", MOVES)
def test_run_that_comes_over_has_the_losses_of_one_that_stayed(
    others: Path, workers: Workers, tmp_path: Path, case: str
) -> None:
    needs_library(case)
    strategy, ranks, words = MOVES[case]
    code, out, err = read_in(others / case, tmp_path / "run", *words)
    assert (code, err) == (0, "")
    assert f"after {BEFORE * GLOBAL_BATCH} samples" in out

    imported = tensors_of(tmp_path / "run")
    for answer in workers.run(go_on, ranks, str(tmp_path / "run"), [f"strategy={strategy}", *words]):
        assert "error" not in answer, answer

    mine, theirs = losses(tmp_path / "run"), told_of(others / case)["losses"]
    assert len(mine) == AFTER
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < LIKE_THERE
    written = tensors_of(tmp_path / "run", BEFORE + AFTER)
    own = {name: tensor for name, tensor in written.items() if not name.startswith("local/")}
    assert {name: (value.shape, value.dtype) for name, value in imported.items()} == {
        name: (value.shape, value.dtype) for name, value in own.items()
    }


@pytest.mark.parametrize("case", MIXED)
def test_mixed_precision_brings_fp32_masters_and_moments_bit_for_bit(others: Path, tmp_path: Path, case: str) -> None:
    needs_library(case)
    code, _, err = read_in(others / case, tmp_path / "run")
    assert (code, err) == (0, "")
    mine, theirs = tensors_of(tmp_path / "run"), torch.load(others / case / "told.pt", weights_only=True)
    assert len(theirs) == (4 if case == "zero0_bf16" else 3) * 12
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    # Stage 0 takes a step of its own with zero gradients when it begins, and its moments count it.
    counted = BEFORE + 1 if case == "zero0_bf16" else BEFORE
    assert {float(value) for name, value in mine.items() if name.endswith("/step")} == {counted}
    record = record_of(tmp_path / "run")
    scaler = {"scale": told_of(others / case)["scaler"], "growth_tracker": 1.0} if case == "zero2_fp16" else {}
    assert record["scaler"] == scaler


@pytest.mark.parametrize("case", ["zero1", "zero3", "ddp", "fsdp"])
def test_what_is_tied_frozen_or_a_buffer_comes_too(others: Path, tmp_path: Path, case: str) -> None:
    needs_library(case)
    assert read_in(others / case, tmp_path / "run")[0] == 0
    mine, record = tensors_of(tmp_path / "run"), record_of(tmp_path / "run")
    assert record["aliases"] == {"head.weight": "embedding.weight"}
    assert "weights/head.weight" not in mine
    assert torch.equal(mine["weights/frozen.weight"], model().frozen.weight)
    assert not any(name.startswith("optim/frozen") for name in mine)
    assert mine["weights/counted"] == BEFORE
    assert (record["progress"]["step"], record["progress"]["samples"]) == (BEFORE, BEFORE * GLOBAL_BATCH)
    assert record["world_size"] == 2
    assert record["config"]["optimizer"]["lr"] == 3e-3


def test_weights_only_begins_with_fresh_moments_at_a_step_that_is_said(others: Path, tmp_path: Path) -> None:
    words = ("--weights-only", "--step", "100", "--samples-seen", "77")
    code, out, _ = read_in(others / "fsdp", tmp_path / "run", *words)
    assert code == 0
    assert "no moments" in out
    mine = tensors_of(tmp_path / "run", 100)
    assert not any(value.any() for name, value in mine.items() if name.startswith("optim/"))
    assert all(value.any() for name, value in mine.items() if name.startswith("weights/"))
    assert record_of(tmp_path / "run")["progress"]["samples"] == 77


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("optimizer=sgd", "~optimizer.beta1", "~optimizer.beta2"),
            "are exp_avg, exp_avg_sq, step, and this optimizer's none",
        ),
        (("trainer.global_batch=0",), "trainer.global_batch"),
        (("--step", "-1"), "--step=-1"),
        (("--names", "nowhere.json"), "nowhere.json"),
        (("--trainer", f"{MINE[1].partition(':')[0]}:Commer"), "Nearest: Comer"),
        (("--trainer", "nowhere.py:Comer"), "names no Python file"),
        (("model=llama_tiny",), "model=llama_tiny was chosen"),
    ],
)
def test_what_does_not_fit_is_one_line(others: Path, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    given = [word for word in WORDS if not (words[0] == "optimizer=sgd" and "beta" in word)]
    mine = words if words[0] == "--trainer" else (*MINE, *(word for word in words if not word.startswith("~")))
    code, out, err = command(["import-checkpoint", str(others / "ddp"), f"run.dir={tmp_path / 'run'}", *given, *mine])
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_another_model_is_named_by_its_first_difference(others: Path, tmp_path: Path) -> None:
    script = tmp_path / "wider.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom torch import nn\nfrom tests.trainer.imports.job import Comer, Model\n"
        "@dataclass(kw_only=True)\nclass Wider(Comer):\n    def make_model(self):\n        found = Model()\n"
        "        found.norm = nn.LayerNorm(7, bias=False)\n        return found\n"
        "@dataclass(kw_only=True)\nclass Longer(Comer):\n    def make_model(self):\n        found = Model()\n"
        "        found.frozen = nn.Linear(7, 8)\n        return found\n"
    )
    run = f"run.dir={tmp_path / 'run'}"
    for name, says in (("Wider", "weights: 'norm.bias' of"), ("Longer", "weights: 'frozen.weight' has shape (7, 7)")):
        words = ["import-checkpoint", str(others / "ddp"), run, *WORDS, "--trainer", f"{script}:{name}"]
        code, _, err = command(words)
        assert code == 2
        assert says in err


def test_nothing_is_overwritten_and_nothing_half_written_counts(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.imports.target import Lazy

    run, read = tmp_path / "run", Lazy.__getattribute__

    def stop(self: Any, name: str) -> Any:
        if name == "read" and read(self, "shape") == (7,):
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Lazy, "__getattribute__", stop)
    assert read_in(others / "fsdp", run)[0] == 130
    assert not list(run.glob("checkpoints/*/manifest.json"))
    monkeypatch.undo()
    assert read_in(others / "fsdp", run)[0] == 0  # what was left behind doesn't matter
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    code, _, err = read_in(others / "ddp", run)
    assert code == 2
    assert "already, from a run" in err
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_optimizer_that_counts_nothing_needs_the_step_and_one_that_is_ambiguous_the_names(tmp_path: Path) -> None:
    script = tmp_path / "twins.py"
    script.write_text(TWINS)
    from_there, run = tmp_path / "there", tmp_path / "run"
    from_there.mkdir()
    first, second = torch.full((4,), 1.0), torch.full((4,), 2.0)
    torch.save({"first": first, "second": second}, from_there / "pytorch_model.bin")
    state = {0: {"momentum_buffer": 3 * first}, 1: {"momentum_buffer": 4 * first}}
    groups = [{"params": [0]}, {"params": [1]}]
    torch.save({"state": state, "param_groups": groups}, from_there / "optimizer.bin")
    words = ["import-checkpoint", str(from_there), f"run.dir={run}", "--trainer", f"{script}:Twins", "optimizer=sgd"]
    words.append("optimizer.momentum=0.9")

    code, _, err = command(words)
    assert (code, "don't say whose they are" in err, "--names" in err) == (2, True, True)
    (tmp_path / "names.json").write_text('[["second"], ["first"]]')
    words += ["--names", str(tmp_path / "names.json")]
    code, _, err = command(words)
    assert (code, "--step N" in err) == (2, True)
    code, out, err = command([*words, "--step", "2"])
    assert (code, err) == (0, ""), out
    mine = tensors_of(run, 2)
    assert torch.equal(mine["optim/first/momentum_buffer"], 4 * first)
    assert torch.equal(mine["optim/second/momentum_buffer"], 3 * first)
    record = record_of(run)
    assert record["progress"]["samples"] == 2 * record["config"]["trainer"]["global_batch"]


TWINS = """
from dataclasses import dataclass
import torch
from torch import nn
from trainer import Trainer

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(4))
        self.second = nn.Parameter(torch.zeros(4))

@dataclass(kw_only=True)
class Twins(Trainer):
    def make_model(self):
        return Model()

    def make_data(self):
        raise AssertionError("reading a checkpoint in needs no data")
"""


def test_model_of_the_model_group_comes_from_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Whose weights lie in safetensors and whose optimizer has numbers for names, in two groups."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2}  # fmt: skip
    module = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=True, **sizes))
    rows = [{"input_ids": torch.arange(6) + row, "labels": torch.arange(6) + row} for row in range(16)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=3, weight_decay=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    try:
        there = Trainer(model=module, args=settings, train_dataset=rows)
        there.train()
        state = there.optimizer.optimizer.state
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    words = [f"model.config.{key}={value}" for key, value in sizes.items()]
    words += ["model.config.vocab_size=300", "model.config.tie_word_embeddings=true", "data.tokenizer=bytes"]
    run = tmp_path / "run"
    code, out, err = command(["import-checkpoint", str(tmp_path / "checkpoint-3"), f"run.dir={run}", *words])
    assert (code, err) == (0, ""), out
    mine = tensors_of(run)
    for name, value in module.named_parameters():
        assert torch.equal(mine[f"weights/{name}"], value), name
        assert torch.equal(mine[f"optim/{name}/exp_avg_sq"], state[value]["exp_avg_sq"]), name
    assert record_of(run)["progress"]["step"] == 3
