"""The next global step: this rank's micro-batches, and what all ranks say of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

from strategies.base import Batch
from strategies.world import World
from trainer.stop import StopRequest


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
    """One message per step carries the counts and the wishes to stop, so that going on needs none of its own."""

    def __init__(self, steps: Iterator[list[Batch]], world: World, request: StopRequest) -> None:
        self._steps = steps
        self._world = world
        self._request = request

    def next(self, wish: str | None) -> GlobalStep:
        """Load, count and agree. Collective.

        Args:
            wish: why this rank wants to end the run, if it does; one rank's is enough.
        """
        batches = next(self._steps)
        targets, tokens, wishes, signalled, numbers, late = self._world.reduce(
            [
                sum(batch.num_targets for batch in batches),
                sum(batch.num_tokens for batch in batches),
                wish is not None,
                self._request.signal != 0,
                self._request.signal,
                self._request.out_of_time(),
            ]
        )
        stop = None
        if wishes:
            stop = next(text for text in self._world.gather(wish) if text is not None)
        elif signalled:
            stop = f"stopped by {_name(numbers / signalled)}"
        elif late:
            stop = "stopped by the time limit (trainer.max_time)"
        return GlobalStep(
            batches=[batch.to(self._world.device) for batch in batches],
            targets=max(targets, 1.0),
            tokens=int(tokens),
            stop=stop,
            interrupted=stop is not None and not wishes,
        )


def _name(number: float) -> str:
    """The signal's name: every rank that heard one has told its number, and this is their mean."""
    return next((known.name for known in signal.Signals if known == number), "signals")
