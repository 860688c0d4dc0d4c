"""Whole runs of two ranks that find damaged checkpoints, on the shared worker processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from strategies.testing import Workers
from tests.faults.damage import DAMAGES, MARK, UNSEEN, case_of, digests, fingerprint
from tests.faults.kit import Kit
from tests.faults.plan import from_json
from tests.faults.stores import own_disk
from tests.trainer.jobs import ROWS, fit, lines
from trainer.checkpoint.store import FolderStore

WORDS = (*ROWS, "trainer.dropout=0.2", "schedule=constant", "checkpoint.every=2", "checkpoint.keep=0")
STEPS = (2, 4, 6)


def fit_with_faults(folder: str, overrides: list[str], faults: str, trainer: str = "Rows") -> dict[str, Any]:
    """A start in this process during which planned faults strike.

    Args:
        folder: of the run.
        overrides: `key=value`.
        faults: from `plan.to_json`.
        trainer: see `jobs.fit`.
    """
    with Kit(from_json(faults), int(os.environ["RANK"])).armed():
        return fit(folder, overrides, trainer)


def fit_on_hosts(folder: str, overrides: list[str], trainer: str = "Rows") -> dict[str, Any]:
    """A start in which each rank is a host with a disk of its own: `<folder>/checkpoints-of-<rank>`."""
    with own_disk(os.environ["RANK"]):
        return fit(folder, overrides, trainer)


def learned(run: Path) -> list[tuple[float, ...]]:
    """Step, loss, gradient norm."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)]


class DamagedRuns:
    """A finished run with checkpoints at `STEPS`, of which each case damages a copy."""

    def __init__(self, workers: Workers, folder: Path) -> None:
        self._workers = workers
        self._folder = folder
        self.whole, self.ready = folder / "whole", folder / "ready"
        self.start(self.whole, 8)
        self.start(self.ready, 6)

    def start(self, run: Path, steps: int, *words: str, size: int = 2) -> dict[str, Any]:
        """One start; all ranks must tell the same."""
        overrides = [*WORDS, f"trainer.max_steps={steps}", *words]
        answers = self._workers.run(fit, size, str(run), overrides, "Rows", timeout=60)
        check_alike(answers)
        return dict(answers[0])

    def copy(self, name: str) -> Path:
        """A run that can be damaged."""
        run = self._folder / name
        shutil.copytree(self.ready, run)
        return run

    def check(self, seed: int, number: int) -> None:
        """Damage one, two, or all checkpoints of a copy, and go on.

        Raises:
            AssertionError: a damaged one was loaded, a good one was passed over or touched, or nobody said so.
        """
        name, draw = case_of(seed, number)
        run = self.copy(f"case-{seed}-{number}")
        store = FolderStore(run / "checkpoints")
        depth = 2 if number % 3 == 2 else 1
        with mock.patch.dict(os.environ, {MARK: str(run / "ran")}):
            for step in sorted(STEPS, reverse=True)[:depth]:
                DAMAGES[name](store, step, draw)
        good = STEPS[: len(STEPS) - depth]
        before = fingerprint(digests(store), good)
        answer = self.start(run, 8)
        assert "error" not in answer, answer
        text = (run / "logs" / "rank-0.log").read_text()
        assert f"going on from {run}/checkpoints/step-{good[-1]:08}" in text, text
        assert f"going back to step-{good[-1]:08}" in text or name in UNSEEN, "nobody was told"
        assert learned(run) == learned(self.whole), "it learned something else"
        assert fingerprint(digests(store), good) == before, "a good checkpoint was changed"
        assert not (run / "ran").exists(), "code in a checkpoint was run"
        shutil.rmtree(run)

    def check_none_whole(self, seed: int, number: int) -> None:
        """Damage all: one line on every rank, and nothing is changed.

        Raises:
            AssertionError: it is otherwise.
        """
        name, draw = case_of(seed, number)
        run = self.copy(f"none-{seed}-{number}")
        store = FolderStore(run / "checkpoints")
        with mock.patch.dict(os.environ, {MARK: str(run / "ran")}):
            for step in sorted(STEPS, reverse=True):
                first = step == STEPS[0] and "another step" in name  # has none before it to be mixed with
                DAMAGES["shard flipped" if first else name](store, step, draw)
        before, rows = digests(store), (run / "metrics.jsonl").read_bytes()
        check_refused(self.start(run, 8), "none in")
        assert digests(store) == before, "files were changed"
        assert (run / "metrics.jsonl").read_bytes() == rows, "metrics.jsonl was changed"
        assert not (run / "ran").exists(), "code in a checkpoint was run"


def check_alike(answers: Sequence[dict[str, Any]]) -> None:
    """All ranks ended in the same way.

    Raises:
        AssertionError: they didn't.
    """
    for answer in answers[1:]:
        assert {answer.get(key) for key in ("error", "message", "reason")} == {
            answers[0].get(key) for key in ("error", "message", "reason")
        }, f"the ranks don't agree: {answers}"


def check_refused(answer: dict[str, Any], words: str) -> None:
    """One line that says what to do.

    Raises:
        AssertionError: it isn't.
    """
    assert answer.get("error") == "ConfigError", answer
    assert words in answer["message"], answer
    assert "\n" not in answer["message"], answer
