"""What was traced of a micro-batch: stages of computing, and what there is at each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.planner.kernels import Call


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A block, or what lies between two of them, in one direction."""

    before: int
    """Bytes of activations that are there when it begins."""
    peak: int
    """The most at once while it runs, with `before`; gradients of parameters left out."""
    calls: tuple[Call, ...]
    """Operators in their order."""
    moments: tuple[tuple[int, int], ...]
    """Bytes of activations, the most before its first parameter's gradient, between that and the second, and so on; and
    of the gradients that backward has brought by then, each whole."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A micro-batch."""

    forward: tuple[Stage, ...]
    """Stage 0 lies before the blocks, 2i + 1 is block i, 2i + 2 lies behind it; the last one holds the loss."""
    backward: tuple[Stage, ...]
    """The same stages, which run from the last."""
    micro_batch: int
    num_tokens: int
    gradients: int = 0
    """Bytes of all parameters' gradients, whole."""

    @property
    def peak(self) -> int:
        """Bytes of activations at the highest."""
        return max(stage.peak for stage in (*self.forward, *self.backward))

    @functools.cached_property
    def moments(self) -> NDArray[np.int64]:
        """[4, moments] of all stages, forward and then backward from the last: the stage's number, activations,
        gradients that were there when the stage began, and those that have come in it.
        """
        stages = [*self.forward, *reversed(self.backward)]
        rows = [
            (number, activations, stage.moments[0][1], gradients - stage.moments[0][1])
            for number, stage in enumerate(stages)
            for activations, gradients in stage.moments
        ]
        return np.array(rows, dtype=np.int64).T

    @property
    def kept(self) -> int:
        """Bytes of activations between forward and backward."""
        return self.backward[-1].before

    @functools.cached_property
    def flops(self) -> float:
        """Of matrix products and attention, recomputation included."""
        known: dict[int, float] = {}  # stages that are alike share their calls
        total = 0.0
        for stage in (*self.forward, *self.backward):
            if id(stage.calls) not in known:
                known[id(stage.calls)] = sum(call.flops for call in stage.calls)
            total += known[id(stage.calls)]
        return total
