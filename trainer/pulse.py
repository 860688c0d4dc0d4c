"""How far this process has come: counted wherever something gets done, and looked at by whoever watches over it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pulse:
    """Of one process, which does one run at a time. Each mark costs well under a microsecond."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Another run is about to start."""
        self.beats = 0
        """Grows with each step, micro-batch, evaluation batch, piece of a file or of tokenised text."""
        self.doing = "starting"
        """The kind of work, in the words of `StepClock`."""
        self.step = 0
        self.steady = False
        """The first step is done, and nothing that is only done once, such as compiling, is in the way."""
        self.waits_for: str | None = None
        """What of other ranks the loop waits for, where it knows."""
        self.waited_s = 0.0
        """Seconds in such waits."""

    def beat(self) -> None:
        """Something got done."""
        self.beats += 1

    def enter(self, kind: str) -> None:
        """Another kind of work begins."""
        self.doing = kind
        self.beats += 1

    def stepped(self, step: int) -> None:
        """An optimizer step is done."""
        self.step, self.steady = step, True
        self.beats += 1

    def finishing(self, what: str) -> None:
        """The loop is over, and something comes that takes as long as it takes."""
        self.doing, self.steady = what, False
        self.beats += 1

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around a wait for other ranks.

        Args:
            what: that they are to do or send, for people.
        """
        self.waits_for, begun = what, time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - begun
            self.waits_for = None


PULSE = Pulse()


def beating(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with a beat at each call."""

    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        PULSE.beats += 1
        return function(*args, **kwargs)

    return called
