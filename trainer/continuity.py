"""Whether a run goes on after a resume as it was going before: losses and gradient norms held against each other."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_REMEMBERED = 20
_ENOUGH = 4
_CHECKED = 3
_BANDS = {"loss": (1.5, 0.1), "gradient norm": (2.0, 0.5)}
"""How far outside of what was seen a value may lie: times the range that was seen, and at least times the median."""


class Continuity:
    """Remembers the newest logged steps, and looks at the first ones after a resume."""

    def __init__(self) -> None:
        self._recent: deque[list[float]] = deque(maxlen=_REMEMBERED)
        self._before: list[list[float]] = []
        self._left = 0

    @property
    def recent(self) -> list[list[float]]:
        """Step, loss and gradient norm of the newest logged steps; for the checkpoint."""
        return list(self._recent)

    def resume(self, recent: Sequence[Sequence[float]]) -> None:
        """The run goes on from a checkpoint that holds `recent`."""
        self._before = [list(entry) for entry in recent if all(math.isfinite(value) for value in entry)]
        self._recent = deque((list(entry) for entry in recent), maxlen=_REMEMBERED)
        self._left = _CHECKED if len(self._before) >= _ENOUGH else 0

    def note(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Remember a logged step.

        Returns:
            What jumped, if this is one of the first steps after a resume and lies far from those before.
        """
        self._recent.append([step, loss, grad_norm])
        if self._left == 0:
            return None
        self._left -= 1
        jumps = [
            text
            for index, (name, value) in enumerate({"loss": loss, "gradient norm": grad_norm}.items(), start=1)
            if (text := self._jump(name, value, [entry[index] for entry in self._before])) is not None
        ]
        if not jumps:
            return None
        self._left = 0
        return f"the run doesn't go on as it was going: at step {step} {' and '.join(jumps)}"

    def _jump(self, name: str, value: float, before: list[float]) -> str | None:
        low, high = min(before), max(before)
        ranges, medians = _BANDS[name]
        margin = max(ranges * (high - low), medians * abs(median(before)))
        if low - margin <= value <= high + margin:
            return None
        return (
            f"the {name} is {value:.4g}, and lay between {low:.4g} and {high:.4g} in the {len(before)} logged steps "
            "before the checkpoint"
        )
