"""A script as somebody outside would write it: data, a hook and settings of its own, without touching this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strategies.testing import Workers
from tests.trainer.commands.jobs import ROOT, script
from tests.trainer.jobs import lines
from trainer.commands.export import export

OWN = """
from dataclasses import dataclass

import numpy as np

from trainer import Trainer, register, run
from trainer.data import AbstractData, Data, make_tokenizer
from trainer.hooks.base import Hook


@register("data", "counting")
@dataclass(kw_only=True)
class Counting(AbstractData):
    length: int = 24

    def build(self, world, cache, say):
        digits = np.arange(self.length) % 10 + ord("0")
        samples = [{"tokens": np.roll(digits, turn).astype(np.int64)} for turn in range(60)]
        return Data(train=samples[:50], validation=samples[50:], tokenizer=make_tokenizer("bytes"),
                    description=f"counting to {self.length}")


@register("hooks", "cheer")
@dataclass(kw_only=True)
class Cheer(Hook):
    word: str = "well done"

    def on_end(self, moment):
        moment.say(f"{self.word} at step {moment.progress.step}")


@dataclass(kw_only=True)
class Louder(Trainer):
    gain: float = 1.0

    def loss(self, outputs, batch):
        terms = super().loss(outputs, batch)
        terms.loss = self.gain * terms.loss
        return terms


DEFAULTS = ("data=counting", "hooks=[cheer,samples]", "hooks.samples.length=4", "trainer.max_steps=12",
            "trainer.log_every=1", "model.config.hidden_size=16", "model.config.intermediate_size=32",
            "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2",
            "model.config.num_key_value_heads=2")

if __name__ == "__main__":
    run(Louder, *DEFAULTS)
"""
DEFAULTS = ("data=counting", "hooks=[cheer]", "trainer.max_steps=4", "trainer.log_every=1", "logger=[]",
            "model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=2",
            "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2")  # fmt: skip


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_own_script_on_two_processes_runs_to_its_end_without_a_stray_line(own: Path, tmp_path: Path) -> None:
    launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", "2", "--script", str(own)]
    found = subprocess.run(
        [*launch, "run.dir=run", "hooks.cheer.word=hurrah"],
        capture_output=True, text=True, cwd=tmp_path, timeout=90, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.count("hurrah at step 12") == 1
    assert "counting to 24" in found.stdout
    starts = ("counting to", "micro-batch:", " parameters", "tensorboard:", "step=", "sample", "  ", "checkpoint at",
              "Summary", "hurrah", "reached step 12", "started by", "predicted: ")  # fmt: skip
    assert found.stdout.count("started by torchrun: 2 processes") == 1
    assert found.stdout.count("predicted: ") == 1
    strange = [line for line in found.stdout.splitlines() if line and not any(word in line[:40] for word in starts)]
    assert strange == []
    assert len(lines(tmp_path / "run")) == 12


def test_own_fields_and_pieces_are_keys_and_strict(workers: Workers, own: Path, tmp_path: Path) -> None:
    def run(name: str, *words: str) -> tuple[int, str, str]:
        words = (f"run.dir={tmp_path / name}", *words)
        [answer] = workers.run(script, 1, str(own), "Louder", list(words), *DEFAULTS)
        return tuple(answer)  # type: ignore[return-value]

    assert run("one")[0] == 0
    assert run("two", "trainer.gain=2.0", "data.length=30")[0] == 0
    first, second = lines(tmp_path / "one")[0]["loss"], lines(tmp_path / "two")[0]["loss"]
    assert second == pytest.approx(2 * first, rel=0.05)
    for word, parts in [
        ("trainer.gian=2", ["trainer.gian", "gain"]),
        ("data.lenght=3", ["data.lenght", "length"]),
        ("hooks.cheer.wort=x", ["hooks.cheer.wort", "word"]),
        ("hooks=[chear]", ["chear", "cheer"]),
        ("data.length=long", ["data.length", "long"]),
    ]:
        code, out, err = run("three", word)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert all(part in err for part in parts), err

    # Nothing in the configuration names the tokenizer of data of one's own: the weights say the vocabulary.
    from transformers import AutoModelForCausalLM

    export(tmp_path / "one", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 259
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 16
    assert torch.isfinite(next(AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())).all()
