"""What a launcher takes, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class State(Enum):
    """Where a job stands."""

    waiting = "waiting"
    """Handed over; no process of it runs yet."""
    running = "running"
    finished = "finished"
    stopped = "stopped"
    """Before its end, with a checkpoint: the same job goes on."""
    failed = "failed"

    @property
    def over(self) -> bool:
        """Nothing more happens by itself."""
        return self in (State.finished, State.stopped, State.failed)


@dataclass(frozen=True, kw_only=True)
class LaunchJob:
    """One training job, as it is handed to a launcher."""

    name: str
    """Letters, digits, `-` and `_`; names the job wherever it is started."""
    script: Path
    """Calls `trainer.run`."""
    overrides: tuple[str, ...] = ()
    """`key=value` words for the script."""
    folder: Path | None = None
    """Where a launcher of this machine puts the run's files; None: as the words say."""
    run_dir: Path | None = None
    """The run's folder as the words say it, where that is known beforehand."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a job does."""

    state: State
    detail: str = ""
    """For people: what it waits for, or why it failed; one line."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest numbers that are known, such as `step`, `loss`, `val_loss`."""
    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """The same names -> step -> value, where more than the newest ones are known."""


class LaunchedJob(ABC):
    """A job that was started."""

    job: LaunchJob

    @property
    @abstractmethod
    def handle(self) -> str:
        """What `Launcher.find` knows it by, from another process too; no secret, since it is written down."""

    @abstractmethod
    def status(self) -> Status:
        """How it does now; quick enough to be asked every second."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to stop with a checkpoint; asked again, it ends at once. Doesn't wait."""


class Launcher(ABC):
    """Starts jobs. A keyword-only dataclass of plain fields, so that it is its own schema in the group `launcher`."""

    @property
    @abstractmethod
    def at_once(self) -> int | None:
        """Jobs of a sweep that may run at the same time; None: all of them."""

    @abstractmethod
    def check(self, jobs: Sequence[LaunchJob]) -> None:
        """Refuse now what would fail later.

        Raises:
            ConfigError: names the key.
        """

    @abstractmethod
    def shown(self, job: LaunchJob) -> str:
        """What `run` would do, for people who only want to see it; nothing is asked or sent.

        Raises:
            ConfigError: it wouldn't be taken.
        """

    @abstractmethod
    def start(self, job: LaunchJob) -> LaunchedJob:
        """Hand the job over and come back at once, leaving the terminal alone.

        Raises:
            ConfigError: it isn't taken.
        """

    @abstractmethod
    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        """A job that this or an earlier process started, whether it runs or is over.

        Returns:
            None: nothing is known of it any more.
        """

    @abstractmethod
    def run(self, job: LaunchJob) -> int:
        """Start one job, show on the terminal how it goes, wait for its end.

        Returns:
            The exit code: 0 finished, 2 wrong input, 75 stopped with a checkpoint, another one: failed.
        """


class ArrayLauncher(Launcher):
    """One that takes many jobs at once, as one; how many of them run at the same time is then its own business."""

    @abstractmethod
    def start_array(self, jobs: Sequence[LaunchJob]) -> Sequence[LaunchedJob]:
        """Hand jobs over that share a script and the folder that theirs are in, and come back at once.

        Returns:
            As many, in the same order.

        Raises:
            ConfigError: they aren't taken, none of them.
        """

    @abstractmethod
    def shown_array(self, jobs: Sequence[LaunchJob]) -> str:
        """What `start_array` would do, for people who only want to see it; nothing is asked or sent.

        Raises:
            ConfigError: they wouldn't be taken.
        """
