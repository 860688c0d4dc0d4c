"""Ranks that are slower than the others by themselves, and not because they wait for one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOWS = 5
"""Logged windows in a row in which a rank must be the slow one, before it is spoken of."""
_CLEARLY = 1.25
"""Times the others' median."""
_LEAST_S = 0.02
"""Seconds per step; below, it is the machine's noise."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A slow rank, with means over the windows in seconds per step."""

    rank: int
    work_s: float
    """Of its own: not waiting for others."""
    data_s: float
    """Of these, getting data."""
    median_s: float
    """Such work of the other ranks."""

    def words(self, host: str) -> str:
        """For one line."""
        more = self.work_s / self.median_s - 1 if self.median_s > 0 else 0.0
        return (
            f"rank {self.rank} ({host}) holds up the others: {self.work_s:.3g} s of work per step where they have "
            f"{self.median_s:.3g} s ({more:.0%} more; {self.data_s:.3g} s of it data), over the last {WINDOWS} logged "
            "windows"
        )


class Stragglers:
    """Remembers who was slow. Fed with the same numbers on every rank, it answers alike on every rank."""

    def __init__(self) -> None:
        self._suspect: int | None = None
        self._seen: list[tuple[float, float, float]] = []
        self._told: int | None = None
        self._quiet = 0

    def note(self, work: Sequence[float], data: Sequence[float]) -> Straggler | None:
        """Take in a window; the rank to speak of, once for as long as it stays slow.

        Args:
            work: of each rank, its own seconds per step.
            data: those of them spent on data.
        """
        slowest, median = slowest_of(work)
        is_slow = work[slowest] >= max(_CLEARLY * median, median + _LEAST_S)
        if not is_slow or slowest != self._suspect:
            self._suspect, self._seen = (slowest if is_slow else None), []
        self._quiet = 0 if is_slow and slowest == self._told else self._quiet + 1
        if self._quiet >= WINDOWS:
            self._told = None
        if not is_slow:
            return None
        self._seen = [*self._seen, (work[slowest], data[slowest], median)][-WINDOWS:]
        if len(self._seen) < WINDOWS or self._told == slowest:
            return None
        self._told, self._quiet = slowest, 0
        work_s, data_s, median_s = (statistics.fmean(values) for values in zip(*self._seen, strict=True))
        return Straggler(rank=slowest, work_s=work_s, data_s=data_s, median_s=median_s)


def slowest_of(work: Sequence[float]) -> tuple[int, float]:
    """The rank with most work, and the median of the others' work."""
    slowest = max(range(len(work)), key=work.__getitem__)
    return slowest, statistics.median([*work[:slowest], *work[slowest + 1 :]] or [work[slowest]])
