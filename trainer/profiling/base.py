"""What a profiler says for itself, and the window of steps in which it is on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from strategies.errors import ConfigError
from strategies.timing import mark_phases
from strategies.world import World
from trainer.metrics.clock import StepClock

_MOST_STEPS = 100
"""A step leaves tens of thousands of events, and each takes a hundred bytes of memory until it is written."""


class Recording(ABC):
    """One recording on one rank. Nothing of it is on before `start` and after `stop`."""

    @abstractmethod
    def mark(self, name: str) -> AbstractContextManager[Any]:
        """A range of that name in what is recorded."""

    @abstractmethod
    def start(self, first: int) -> None:
        """From now on; `first` is the number of the step that comes next."""

    @abstractmethod
    def step(self) -> None:
        """A step is over."""

    @abstractmethod
    def stop(self, *, keep: bool) -> str:
        """End it, and say where its result is and how to look at it; "" where there is none.

        Args:
            keep: whether somebody will want the result.

        Raises:
            OSError: the result can't be written.
        """


@dataclass(kw_only=True)
class AbstractProfiler(ABC):
    """Records some steps of a run, on some ranks.

    Raises:
        ConfigError: a number is out of range.
    """

    has_device: ClassVar[bool] = False
    """Whether it has the device's own clocks to itself for the whole run, so that nobody else may read them."""

    start: int = 10
    """The first step that is recorded, counted over all starts of the run."""
    steps: int = 3
    """How many steps are recorded."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that record, each into a file of its own."""

    def __post_init__(self) -> None:
        self._refuse("start", self.start, 1, None)
        self._refuse("steps", self.steps, 1, _MOST_STEPS)
        if not self.ranks or len(set(self.ranks)) < len(self.ranks) or min(self.ranks) < 0:
            raise ConfigError(
                f"{type(self).__name__}: ranks={self.ranks} is no list of ranks, each once. Try [0] (profiler.ranks)."
            )

    def _refuse(self, key: str, value: int, least: int, most: int | None) -> None:
        if value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise ConfigError(
                f"{type(self).__name__}: {key}={value} is out of range. Choose {bounds} (profiler.{key})."
            )

    def refuse_world(self, world: World) -> None:
        """Refuse what can't be done on these ranks.

        Raises:
            ConfigError: on every rank.
        """
        if max(self.ranks) >= world.size:
            raise ConfigError(
                f"{type(self).__name__}: ranks={self.ranks} names rank {max(self.ranks)}, and the run has ranks 0 to "
                f"{world.size - 1}. Leave it out (profiler.ranks)."
            )

    def lead(self) -> int:
        """Steps before the first recorded one in which it warms up."""
        return 0

    @abstractmethod
    def recording(self, world: World, folder: Path) -> Recording:
        """A recording on this rank, into files below `folder`."""


class Window:
    """Turns a profiler on before its first step and off after its last; says what it does."""

    def __init__(
        self, profiler: AbstractProfiler, world: World, folder: Path, clock: StepClock, say: Callable[[str], None]
    ) -> None:
        """Nothing happens before `begin`; the folder is the run's."""
        self._profiler, self._world, self._folder = profiler, world, folder
        self._clock, self._say = clock, say
        self._recording: Recording | None = None
        self._opens: int | None = None
        self._done = 0

    def begin(self, step: int, total: int | None) -> None:
        """The run goes on after `step`, and to `total` if that is known."""
        first, last = self._profiler.start, self._profiler.start + self._profiler.steps - 1
        which = f"steps {first} to {last}" if last > first else f"step {first}"
        if step >= last:
            self._say(
                f"profiler: {which} are past, the run goes on after step {step}: nothing is recorded (profiler.start)"
            )
            return
        if total is not None and first > total:
            self._say(
                f"profiler: {which} come after the end at step {total}: nothing is recorded (profiler.start, "
                "trainer.max_steps)"
            )
            return
        self._first, self._last = max(first, step + 1), last if total is None else min(last, total)
        cut = " (the rest is past)" if self._first > first else " (there the run ends)" if self._last < last else ""
        self._say(
            f"profiler: records steps {self._first} to {self._last}{cut} on {self._ranks()}, below "
            f"{self._folder / 'profiles'}"
        )
        self._opens = max(step, self._first - 1 - self._profiler.lead())
        self.advance(step)

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self._recording is not None:
            self._recording.step()
            if step >= self._last:
                self.close(keep=True)
        elif step == self._opens:
            self._opens = None  # once, also where the run is rolled back
            if self._world.rank in self._profiler.ranks:
                self._open(step + 1)

    def _open(self, first: int) -> None:
        recording = self._profiler.recording(self._world, self._folder / "profiles")
        with self._clock.measure("hooks"):
            try:
                recording.start(first)
            except Exception as error:  # the training matters more
                self._say(f"profiler: it can't start, nothing is recorded: {type(error).__name__}: {error}")
                return
        self._recording = recording
        mark_phases(recording.mark)

    def close(self, *, keep: bool) -> None:
        """End what is still on; may be called twice."""
        recording, self._recording, self._opens = self._recording, None, None
        if recording is None:
            return
        mark_phases(None)
        with self._clock.measure("hooks"):
            try:
                if told := recording.stop(keep=keep):
                    self._say(f"profiler: {told}")
            except Exception as error:
                self._say(f"profiler: the result can't be written: {type(error).__name__}: {error}")

    def _ranks(self) -> str:
        ranks = self._profiler.ranks
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
