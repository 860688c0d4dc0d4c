"""A launcher whose jobs are made of looks at them: each look is a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.launch.book import Book, Entry, Objective
from trainer.launch.search import Search
from trainer.launch.sweep import Plan, Sweep


@dataclass(kw_only=True)
class Fate:
    """What becomes of a job."""

    steps: int = 3
    ends: State = State.finished
    loss: Callable[[int], float] = lambda step: 1.0 / step
    """Of a step; its `val_loss`."""


class FakeJob(LaunchedJob):
    def __init__(self, job: LaunchJob, fate: Fate, cloud: FakeLauncher) -> None:
        self.job, self.fate, self._cloud = job, fate, cloud
        self.step, self.stops = 0, 0
        self.curve: dict[int, float] = {}

    @property
    def handle(self) -> str:
        return f"fake {self.job.name}"

    @property
    def over(self) -> bool:
        return self.stops > 0 or self.step >= self.fate.steps

    def status(self) -> Status:
        if not self.over:
            self.step += 1
            self.curve[self.step] = self.fate.loss(self.step)
            self._cloud.look(self)
        state = State.running
        if self.over:
            state = self.fate.ends if self.step >= self.fate.steps else State.stopped
        metrics = {"step": self.step, "val_loss": self.curve[self.step]} if self.curve else {}
        return Status(state=state, detail="it burns" * (state is State.failed), metrics=metrics,
                      curves={"val_loss": self.curve})  # fmt: skip

    def stop(self) -> None:
        if not self._cloud.deaf or self.stops or self.job.name in self._cloud.told:
            self.stops += 1
        self._cloud.told.append(self.job.name)


@dataclass(kw_only=True)
class FakeLauncher(Launcher):
    """Remembers what it has started, as a cluster does when the command that sent the jobs is gone."""

    most: int | None = 2
    fates: Callable[[Mapping[str, str]], Fate] = lambda values: Fate()
    refuses: str = ""
    """The name of a job that isn't taken."""
    look: Callable[[FakeJob], None] = lambda job: None
    deaf: bool = False
    """Jobs end when they are told for the second time."""
    told: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    peak: int = 0

    @property
    def at_once(self) -> int | None:
        return self.most

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        """All are fine."""

    def shown(self, job: LaunchJob) -> str:
        return job.name

    def start(self, job: LaunchJob) -> LaunchedJob:
        if job.name == self.refuses:
            raise ConfigError("Fake: no room (launcher.room).")
        self.started.append(job.name)
        made = FakeJob(job, self.fates(dict(word.split("=", 1) for word in job.overrides)), self)
        before = self.jobs.get(job.name)
        if before is not None and before.step < before.fate.steps:  # goes on
            made.step, made.curve = before.step, before.curve
        self.jobs[job.name] = made
        self.peak = max(self.peak, sum(not each.over for each in self.jobs.values()))
        return made

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        found = self.jobs.get(job.name)
        return found if found is not None and found.handle == handle else None

    def run(self, job: LaunchJob) -> int:
        raise AssertionError("a sweep starts its jobs")


ABOUT = {"settings": "these"}


def sweep(
    folder: Path,
    launcher: Launcher,
    search: Callable[[Book], Search],
    objective: Objective | None = None,
    show: Callable[[Sequence[Entry]], None] = lambda entries: None,
    **plan: Any,
) -> tuple[int, dict[str, Entry], list[str]]:
    """One command: its exit code, the jobs as they are written down, and what was said."""
    said: list[str] = []
    book = Book(folder, ABOUT)
    shared = Plan(script=Path("train.py"), fixed=(), objective=objective or Objective(), **plan)
    try:
        code = Sweep(shared, book, search(book), launcher, show, said.append, poll_s=0.0).run()
    finally:
        book.close()
    book = Book(folder, ABOUT)
    book.close()
    return code, {entry.name: entry for entry in book.entries}, said
