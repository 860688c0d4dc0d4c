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
    """Why all ranks agreed to stop instead of taking this step."""


class Feed:
    """One message per step carries the counts and the wishes to stop, so that stopping needs none of its own."""

    def __init__(self, steps: Iterator[list[Batch]], world: World, request: StopRequest) -> None:
        self._steps = steps
        self._world = world
        self._request = request

    def next(self) -> GlobalStep:
        """Load, count and agree. Collective."""
        batches = next(self._steps)
        targets, tokens, signalled, numbers, late = self._world.reduce(
            [
                sum(batch.num_targets for batch in batches),
                sum(batch.num_tokens for batch in batches),
                self._request.signal != 0,
                self._request.signal,
                self._request.out_of_time(),
            ]
        )
        stop = None
        if signalled:
            stop = _name(numbers / signalled)
        elif late:
            stop = "the time limit (trainer.max_time)"
        return GlobalStep(
            batches=[batch.to(self._world.device) for batch in batches],
            targets=max(targets, 1.0),
            tokens=int(tokens),
            stop=stop,
        )


def _name(number: float) -> str:
    """The signal's name: every rank that heard one has told its number, and this is their mean."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signals"
