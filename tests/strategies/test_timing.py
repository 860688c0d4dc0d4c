"""Spans of time that overlap, and phases."""

from __future__ import annotations

import contextlib
import timeit

import pytest

from strategies.timing import Span, length, mark_phases, merged, outside, phase


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([], []),
        ([(1.0, 2.0)], [(1.0, 2.0)]),
        ([(3.0, 4.0), (1.0, 2.0)], [(1.0, 2.0), (3.0, 4.0)]),
        ([(1.0, 5.0), (2.0, 3.0)], [(1.0, 5.0)]),
        ([(1.0, 3.0), (2.0, 4.0), (4.0, 5.0)], [(1.0, 5.0)]),
        ([(2.0, 2.0)], []),
    ],
)
def test_merged_has_no_overlaps(spans: list[Span], wanted: list[Span]) -> None:
    assert merged(spans) == wanted
    assert length(spans) == sum(end - begin for begin, end in wanted)


@pytest.mark.parametrize(
    ("spans", "cover", "wanted"),
    [
        ([(0.0, 10.0)], [], 10.0),
        ([], [(0.0, 10.0)], 0.0),
        ([(0.0, 10.0)], [(2.0, 3.0), (9.0, 20.0)], 8.0),
        ([(0.0, 4.0), (2.0, 6.0)], [(1.0, 5.0)], 2.0),
        ([(2.0, 3.0)], [(1.0, 4.0)], 0.0),
    ],
)
def test_outside_is_what_no_cover_covers(spans: list[Span], cover: list[Span], wanted: float) -> None:
    assert outside(iter(spans), iter(cover)) == wanted


def test_phase_costs_nothing_while_nobody_looks() -> None:
    def step() -> None:
        with phase("forward"):
            pass

    assert min(timeit.repeat(step, number=1000, repeat=5)) < 2e-3, "more than 2 us"


def test_phase_is_marked_while_somebody_looks() -> None:
    seen: list[str] = []
    mark_phases(lambda name: contextlib.nullcontext(seen.append(name)))
    try:
        with phase("forward"), phase("backward"):
            pass
    finally:
        mark_phases(None)
    with phase("step"):
        pass
    assert seen == ["forward", "backward"]
