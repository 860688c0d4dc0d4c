"""Whether a run goes on as it was going: what is a jump, and what is noise."""

from __future__ import annotations

import math
import random

import pytest

from trainer.continuity import Continuity

BEFORE = [[step, 2.5 - 0.01 * step + 0.05 * (step % 3), 1.0 + 0.2 * (step % 2)] for step in range(1, 11)]


def resumed() -> Continuity:
    found = Continuity()
    found.resume(BEFORE)
    return found


@pytest.mark.parametrize(("loss", "norm"), [(2.4, 1.1), (2.3, 0.9), (2.55, 1.6)])
def test_continuity_within_the_band_says_nothing(loss: float, norm: float) -> None:
    assert resumed().note(11, loss, norm) is None


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [(5.5, 1.1, "loss is 5.5"), (0.3, 1.1, "loss is 0.3"), (2.4, 9.0, "gradient norm is 9"), (math.nan, 1.0, "nan")],
)
def test_continuity_of_a_jump_says_where_and_from_what(loss: float, norm: float, words: str) -> None:
    found = resumed().note(11, loss, norm)
    assert found is not None
    assert words in found
    assert "step 11" in found
    assert "10 logged steps" in found


def test_continuity_looks_at_the_first_steps_only_and_speaks_once() -> None:
    found = resumed()
    assert [found.note(step, 2.4, 1.0) for step in (11, 12, 13)] == [None] * 3
    assert found.note(14, 99.0, 1.0) is None
    found = resumed()
    assert found.note(11, 99.0, 1.0) is not None
    assert found.note(12, 99.0, 1.0) is None


def test_continuity_without_enough_to_compare_says_nothing() -> None:
    found = Continuity()
    found.resume(BEFORE[:3])
    assert found.note(4, 99.0, 99.0) is None


def test_continuity_remembers_the_newest() -> None:
    found = Continuity()
    for step in range(1, 31):
        found.note(step, 1.0, 1.0)
    assert [entry[0] for entry in found.recent] == list(range(11, 31))


def test_continuity_of_noise_is_seldom_a_jump() -> None:
    generator = random.Random(0)
    alarms = 0
    for _ in range(1000):
        values = [[step, generator.gauss(2.5, 0.2), generator.lognormvariate(0, 0.3)] for step in range(20)]
        found = Continuity()
        found.resume(values[:10])
        alarms += any(found.note(*map(float, entry)) for entry in values[10:])  # type: ignore[arg-type]
    assert alarms <= 5
