"""Where a step's time goes: phases that a profiler can see, and spans of time that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

Span: TypeAlias = tuple[float, float]
"""Begin and end, on one clock."""

_UNMARKED = nullcontext()
_mark: Callable[[str], AbstractContextManager[Any]] | None = None


def phase(name: str) -> AbstractContextManager[Any]:
    """Around a part of a step, such as `forward`: a range of that name, while somebody wants ranges."""
    return _UNMARKED if _mark is None else _mark(name)


def mark_phases(mark: Callable[[str], AbstractContextManager[Any]] | None) -> None:
    """Give each phase of this process a range from now on, made by `mark` from its name; None: no longer."""
    global _mark
    _mark = mark


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > begin:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """How long they are together; what overlaps counts once."""
    return sum(end - begin for begin, end in merged(spans))


def outside(spans: Iterable[Span], cover: Iterable[Span]) -> float:
    """How much of `spans` no span of `cover` covers."""
    covered = list(cover)
    return length([*spans, *covered]) - length(covered)
