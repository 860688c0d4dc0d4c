from __future__ import annotations

import math
from typing import Any

import pytest

from strategies.errors import ConfigError
from trainer.schedule import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    Schedule,
    WSDSchedule,
)

ALL = (ConstantSchedule, LinearSchedule, CosineSchedule, WSDSchedule, InverseSqrtSchedule)


@pytest.mark.parametrize("kind", ALL)
def test_factor_in_warmup_rises_linearly_and_never_starts_at_zero(kind: type[Schedule]) -> None:
    schedule = kind(warmup=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ALL)
def test_factor_without_warmup_starts_full(kind: type[Schedule]) -> None:
    schedule = kind(warmup=1 if kind is InverseSqrtSchedule else 0)
    assert schedule.factor(0, 100) == 1.0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_factor_stays_between_zero_and_one(kind: type[Schedule], total: int) -> None:
    schedule = kind(warmup=1)
    factors = [schedule.factor(step, total) for step in range(total + 3)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[1:] == sorted(factors[1:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (LinearSchedule(final_ratio=0.0, warmup=3), 0.0),
        (LinearSchedule(final_ratio=0.3), 0.3),
        (CosineSchedule(final_ratio=0.1, warmup=3), 0.1),
        (WSDSchedule(final_ratio=0.05, decay=0.3), 0.05),
        (ConstantSchedule(), 1.0),
    ],
)
def test_factor_of_last_step_is_final(schedule: Schedule, last: float) -> None:
    assert schedule.factor(19, 20) == pytest.approx(last)
    assert schedule.factor(25, 20) == pytest.approx(last)


def test_cosine_halfway_is_the_mean() -> None:
    assert CosineSchedule(final_ratio=0.2).factor(10, 21) == pytest.approx(0.6)


def test_linear_falls_by_equal_amounts() -> None:
    factors = [LinearSchedule(final_ratio=0.0).factor(step, 11) for step in range(11)]
    assert factors == pytest.approx([1 - step / 10 for step in range(11)])


def test_wsd_is_stable_then_falls_in_its_share() -> None:
    schedule = WSDSchedule(warmup=2, decay=0.25, final_ratio=0.0)
    factors = [schedule.factor(step, 20) for step in range(20)]
    assert factors[2:15] == [1.0] * 13
    assert factors[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_with_decay_longer_than_what_warmup_leaves_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"warmup of 8 steps and a decay of 5 .*\(schedule\.warmup, schedule\.decay\)"
    ):
        WSDSchedule(warmup=8, decay=0.5).factor(0, 10)


def test_inverse_sqrt_falls_with_the_root_and_needs_no_end() -> None:
    schedule = InverseSqrtSchedule(warmup=100)
    assert schedule.factor(99, None) == 1.0
    assert schedule.factor(399, None) == pytest.approx(0.5)
    assert schedule.factor(9999, None) == pytest.approx(math.sqrt(0.01))


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, WSDSchedule])
def test_factor_without_total_where_needed_is_refused(kind: type[Schedule]) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        kind().factor(0, None)


@pytest.mark.parametrize("kind", ALL)
def test_factor_with_warmup_beyond_total_is_refused(kind: type[Schedule]) -> None:
    with pytest.raises(ConfigError, match=r"warmup=11 is longer than the run of 10 steps.*schedule\.warmup"):
        kind(warmup=11).factor(0, 10)
    assert kind(warmup=5).factor(4, 10) == 1.0


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (ConstantSchedule, {"warmup": -1}, "schedule.warmup"),
        (ConstantSchedule, {"warmup": 2.5}, "schedule.warmup"),
        (InverseSqrtSchedule, {"warmup": 0}, "schedule.warmup"),
        (CosineSchedule, {"final_ratio": 1.5}, "schedule.final_ratio"),
        (LinearSchedule, {"final_ratio": -0.1}, "schedule.final_ratio"),
        (WSDSchedule, {"decay": 2.0}, "schedule.decay"),
    ],
)
def test_schedule_with_value_out_of_range_is_refused(kind: type[Schedule], fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_factor_with_warmup_below_one_takes_that_share_of_the_run() -> None:
    share, steps = CosineSchedule(warmup=0.05), CosineSchedule(warmup=5)
    assert [share.factor(step, 100) for step in range(100)] == [steps.factor(step, 100) for step in range(100)]
    assert CosineSchedule(warmup=0.05).factor(0, 3) == 1.0
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        ConstantSchedule(warmup=0.05).factor(0, None)
