"""Runs that move, on real checkpoints, and how they are held against the runs that don't."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from strategies.testing import JobError, Workers
from tests.faults.compare import last_checkpoint, strays
from tests.moves import job
from tests.moves.job import AFTER, BEFORE, GLOBAL_BATCH, MICRO_BATCHES, STEPS, Kind
from tests.moves.plan import Move, Place
from tests.trainer.jobs import curve, record_of

_EXACT = ("lr", "tokens", "samples", "epoch", "skipped")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that came to its end."""

    folder: Path
    order: list[list[str]]
    """Of each step of the last start: the samples of all ranks, in order."""


@dataclass(kw_only=True)
class Result:
    """A move, held against the run that stayed; all numbers are largest differences after the move."""

    move: Move
    loss: float = 0.0
    """Of training, in nats."""
    evaluation: float = 0.0
    """Of validation, of the weights and of their average, in nats."""
    norm: float = 0.0
    """Of the gradient; relative."""
    tensors: float = 0.0
    """Of the last checkpoints: L2 distance over L2 norm, of all weights, all averages, or all moments of a kind."""
    same_order: bool = False
    """The same samples in the same order, each step."""
    problems: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Runner:
    """Runs one job here and there.

    Args:
        workers: as many as the largest place has ranks.
        folder: for all runs.
        kind: of job.
    """

    workers: Workers
    folder: Path
    kind: Kind = job.LLAMA_FP32

    def __post_init__(self) -> None:
        self.seeds: list[int] = []
        """Of each rank's random stream in the last start."""
        self._number = itertools.count()
        self._stayed: dict[tuple[Place, tuple[str, ...]], Run] = {}
        self._data = [job.write_documents(self.folder / "documents")] if "data=text" in self.kind.words else []

    def stayed(self, place: Place, *words: str) -> Run:
        """The run that doesn't move; made once. Every other one saves in the background."""
        key = (place, words)
        if key not in self._stayed:
            background = f"checkpoint.async_save={len(self._stayed) % 2 == 1}".lower()
            folder = self.folder / f"stays-{len(self._stayed):03}-{place}"
            order = self.start(folder, place, f"checkpoint.every={BEFORE}", background, *words)
            self._stayed[key] = Run(folder=folder, order=order)
        return self._stayed[key]

    def begun(self, place: Place, *words: str) -> Path:
        """A copy of that run as if it had been killed at its end, with only the checkpoint at `BEFORE` left."""
        folder = self.folder / f"moves-{next(self._number):03}"
        shutil.copytree(self.stayed(place, *words).folder, folder)
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if checkpoint.name != f"step-{BEFORE:08}":
                shutil.rmtree(checkpoint)
        (folder / "summary.json").unlink()
        return folder

    def start(self, folder: Path, place: Place, *words: str, until: int = STEPS) -> list[list[str]]:
        """Start a run, or go on with it, which must come to step `until`; the samples of each step."""
        given = [*self.kind.words, *self._data, f"strategy={place.strategy}",
                 f"trainer.micro_batch={MICRO_BATCHES[place.size]}", *words]  # fmt: skip
        answers = self.workers.run(
            job.start, place.size, str(folder), given, self.kind.trainer, local_size=place.local_size, timeout=120
        )
        for ending, _ in answers:
            assert ending.get("progress", {}).get("step") == until, f"{place}: {ending}"
        self.seeds = [seen.seed for _, seen in answers]
        share = GLOBAL_BATCH // place.size
        steps = len(answers[0][1].digests) // share
        return [
            [digest for _, seen in answers for digest in seen.digests[step * share : (step + 1) * share]]
            for step in range(steps)
        ]

    def move(
        self, move: Move, *words: str, folder: Path | None = None, there: Sequence[str] = (), keep: bool = False
    ) -> Result:
        """Go on somewhere else, and compare.

        Args:
            move: from where to where.
            words: further configuration of both runs.
            folder: of a run that has come to `BEFORE`; null: a copy of the one that stays.
            there: further configuration of the run that moves.
            keep: the run's folder, also if all is well.
        """
        stayed = self.stayed(move.source, *words)
        folder = folder or self.begun(move.source, *words)
        try:
            moved = Run(folder=folder, order=self.start(folder, move.target, *words, *there))
        except (AssertionError, JobError) as error:
            return Result(move=move, problems=[str(error).splitlines()[0]])
        result = held_against(move, moved, stayed, self.kind)
        if not (result.problems or keep):
            shutil.rmtree(folder)
        return result


def held_against(move: Move, moved: Run, stayed: Run, kind: Kind) -> Result:
    """What came of a move."""
    result = Result(move=move)
    mine, theirs = curve(moved.folder), curve(stayed.folder)
    problem = result.problems.append
    for name, rows in (("moved", mine), ("unmoved", theirs)):
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            problem(f"the {name} run's steps are {[row['step'] for row in rows]}")
            return result
    for row, wanted in zip(mine[BEFORE:], theirs[BEFORE:], strict=True):
        if row.keys() != wanted.keys():
            problem(f"step {row['step']} has {sorted(row.keys() ^ wanted.keys())} only once")
            return result
        result.loss = max(result.loss, abs(row["loss"] - wanted["loss"]))
        result.norm = max(result.norm, abs(row["grad_norm"] - wanted["grad_norm"]) / wanted["grad_norm"])
        for name in (name for name in row if name.endswith("val_loss")):
            result.evaluation = max(result.evaluation, abs(row[name] - wanted[name]))
        for name in _EXACT:
            if row[name] != wanted[name]:
                problem(f"{name} of step {row['step']} is {row[name]}, not {wanted[name]}")
    result.same_order = moved.order == stayed.order[BEFORE:] and len(moved.order) == AFTER
    if not result.same_order:
        problem("samples differ, or their order")
    for name, value, bound in (
        ("losses", result.loss, kind.loss),
        ("evaluations", result.evaluation, kind.loss),
        ("gradient norms", result.norm, kind.norm),
    ):
        if not value <= bound:
            problem(f"{name} are {value:.2g} apart, {bound:.2g} allowed")
    compare_checkpoints(result, moved.folder, stayed.folder)
    return result


def compare_checkpoints(result: Result, mine: Path, theirs: Path) -> None:
    """The last ones: tensors, scaler, position."""
    (_, have), (_, want) = last_checkpoint(mine), last_checkpoint(theirs)
    have, want = (
        {name: value for name, value in each.items() if not name.startswith("local/")} for each in (have, want)
    )
    if have.keys() != want.keys():
        result.problems.append(f"tensors of the last checkpoints: {sorted(have.keys() ^ want.keys())} only in one")
    common = [name for name in have.keys() & want.keys() if want[name].is_floating_point()]  # the others count batches
    for names in _kinds(common).values():
        result.tensors = max(result.tensors, _distance([have[name] for name in names], [want[name] for name in names]))
    records = [record_of(folder) for folder in (mine, theirs)]
    for name in ("scaler", "aliases"):
        if records[0][name] != records[1][name]:
            result.problems.append(f"{name} of the last checkpoint: {records[0][name]}, not {records[1][name]}")
    result.problems += strays(mine)


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        kind, _, rest = name.partition("/")
        found.setdefault(f"{kind}/{rest.rpartition('/')[2]}" if kind == "optim" else kind, []).append(name)
    return found


def _distance(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Of all together: a tensor by itself may be nothing but rounding, such as the bias of attention's keys."""
    apart, whole = (
        math.hypot(*(float(value.double().norm()) for value in values))
        for values in ([a.double() - b.double() for a, b in zip(mine, theirs, strict=True)], theirs)
    )
    return apart and apart / max(whole, 1e-30)
