"""docs/examples/digits.py does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.trainer.commands.jobs import ROOT, script

DIGITS = str(ROOT / "docs" / "examples" / "digits.py")
DEFAULTS = (
    "trainer.max_epochs=10",
    "trainer.global_batch=32",
    "trainer.micro_batch=16",
    "optimizer.lr=3e-3",
    "hooks=[]",
)


@pytest.mark.parametrize("size", [1, 2])
def test_digits_learns_in_seconds(workers: Workers, tmp_path: Path, size: int) -> None:
    words = [f"run.dir={tmp_path / 'run'}", "logger=[]"]
    for code, _, errors in workers.run(script, size, DIGITS, "DigitsTrainer", words, *DEFAULTS):
        assert (code, errors) == (0, ""), errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_val_accuracy"] > 0.9
    assert summary["seconds"] < 30


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("trainer.hiden=3", ["trainer.hiden", "Nearest: hidden"]),
        ("trainer.hidden=wide", ["trainer.hidden", "wide"]),
        ("model=llama_tiny", ["DigitsTrainer", "model=llama_tiny"]),
        ("data=text", ["data"]),
    ],
)
def test_digits_wrong_key_is_one_line(workers: Workers, tmp_path: Path, word: str, parts: list[str]) -> None:
    words = [f"run.dir={tmp_path / 'run'}", word]
    [(code, out, errors)] = workers.run(script, 1, DIGITS, "DigitsTrainer", words, *DEFAULTS)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("ConfigError: ")
    assert all(part in errors for part in parts), errors
    assert not (tmp_path / "run").exists()


def test_digits_is_short() -> None:
    assert len(Path(DIGITS).read_text().splitlines()) < 60
