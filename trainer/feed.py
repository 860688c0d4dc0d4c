"""The next global step: this rank's micro-batches, and what all ranks say of it."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from strategies.base import Batch
from strategies.elastic import RanksChanged
from strategies.world import World
from trainer.pulse import PULSE
from trainer.stop import StopRequest

AT_ONCE_S = 0.25
"""Steps that take no longer than this together are agreed on together; so long a stop may wait at most."""


@dataclass(frozen=True, kw_only=True)
class GlobalStep:
    """One optimizer step's input."""

    batches: list[Batch]
    """This rank's, on its device."""
    targets: float
    """Counted positions over all ranks; at least 1."""
    tokens: int
    """Real tokens over all ranks."""
    stop: str | None
    """Why all ranks agreed to end here instead of taking this step."""
    interrupted: bool
    """That is before the run's end: it is to go on later."""


class Feed:
    """One message carries the counts of a few steps and the wishes to stop, so that going on needs none of its own."""

    def __init__(
        self,
        steps: Iterator[list[Batch]],
        world: World,
        request: StopRequest,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._steps = steps
        self._world = world
        self._request = request
        self._now = now
        self._on_cpu = world.device.type == "cpu"
        self._loaded: deque[list[Batch]] = deque()
        self._agreed: deque[GlobalStep] = deque()
        self._at_once = 1
        self._before: tuple[float, int] | None = None  # when the last message was sent, and of how many steps

    def next(self, wish: str | None, most: int = 1) -> GlobalStep:
        """Load, count and agree. Collective.

        Args:
            wish: why this rank wants to end the run, if it does; one rank's is enough.
            most: steps from this one on after which a rank may have such a wish, or does something besides
                steps; the same on every rank.

        Raises:
            RanksChanged: there are to be more ranks, or fewer; on every rank.
        """
        if not self._agreed:
            self._agree(wish, min(most, self._at_once))
        elif len(self._loaded) < self._at_once:
            self._loaded.append(next(self._steps))  # one with each step, so that a device has work meanwhile
        step = self._agreed.popleft()
        if self._on_cpu:
            return step
        return replace(step, batches=[batch.to(self._world.device) for batch in step.batches])

    def _agree(self, wish: str | None, count: int) -> None:
        while len(self._loaded) < count:
            self._loaded.append(next(self._steps))
        steps = [self._loaded.popleft() for _ in range(count)]
        request, elastic = self._request, self._world.elastic
        counts = [
            *(sum(batch.num_targets for batch in batches) for batches in steps),
            *(sum(batch.num_tokens for batch in batches) for batches in steps),
        ]
        votes = [
            wish is not None, request.signal != 0, request.signal, request.out_of_time(),
            elastic is not None and elastic.changed(), self._seconds_per_step(count),
        ]  # fmt: skip
        with PULSE.waiting("the next step's counts"):
            *sums, wishes, signalled, numbers, late, changed, seconds = self._world.reduce(counts, votes=votes)
        if seconds > 0:
            self._at_once = max(1, int(AT_ONCE_S * self._world.size / seconds))
        stop = None
        if wishes:
            stop = next(text for text in self._world.gather(wish) if text is not None)
        elif signalled:
            stop = f"stopped by {_name(numbers / signalled)}"
        elif late:
            stop = "stopped by the time limit (trainer.max_time)"
        if changed and stop is None:
            raise RanksChanged("the hosts have changed")
        for batches, targets, tokens in zip(steps, sums[:count], sums[count:], strict=True):
            self._agreed.append(
                GlobalStep(
                    batches=batches,
                    targets=max(targets, 1.0),
                    tokens=int(tokens),
                    stop=stop,
                    interrupted=stop is not None and not wishes,
                )
            )

    def _seconds_per_step(self, count: int) -> float:
        """Of those that the message before was about, with whatever else was done meanwhile; 0: not known."""
        now, before = self._now(), self._before
        self._before = (now, count)
        return 0.0 if before is None else (now - before[0]) / before[1]


def _name(number: float) -> str:
    """The signal's name: every rank that heard one has told its number, and this is their mean."""
    return next((known.name for known in signal.Signals if known == number), "signals")
