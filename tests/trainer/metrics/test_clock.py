"""StepClock, on a clock that the tests turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from strategies.timing import mark_phases
from trainer.metrics.clock import StepClock


class Hand:
    """A clock's hand that moves only when told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at

    def pass_(self, seconds: float) -> None:
        self.at += seconds


def step(
    clock: StepClock,
    hand: Hand,
    *,
    data: float,
    compute: float,
    communication: float | None = None,
    whole: float | None = None,
) -> None:
    with clock.measure("data"):
        hand.pass_(data)
    hand.pass_(compute)
    clock.step_done(communication, whole, tokens=100)


def test_window_parts_add_up_to_the_step() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=1, compute=3, communication=0.5)
    step(clock, hand, data=2, compute=6, communication=1.5)
    found = clock.window()
    assert found == {
        "step_s": 6.0,
        "tokens_per_s": pytest.approx(200 / 12),
        "data_s": 1.5,
        "compute_s": 3.5,
        "communication_s": 1.0,
        "checkpoint_s": 0.0,
    }
    assert found["data_s"] + found["compute_s"] + found["communication_s"] == found["step_s"]


def test_window_leaves_evaluation_checkpoint_and_hooks_out_of_the_rate() -> None:
    hand = Hand()
    clock = StepClock(hand)
    for kind in ("evaluation", "checkpoint", "hooks"):
        with clock.measure(kind):
            hand.pass_(10)
    step(clock, hand, data=0, compute=2)
    found = clock.window()
    assert (found["step_s"], found["tokens_per_s"], found["checkpoint_s"]) == (2.0, 50.0, 10.0)


def test_window_counts_what_was_waited_for_after_the_step() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=0, compute=1)
    hand.pass_(4)  # reading the loss waits for the device
    assert clock.window()["compute_s"] == 5.0


def test_window_unknown_communication_has_no_key() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=1, compute=1, communication=0.5)
    step(clock, hand, data=1, compute=1)
    assert "communication_s" not in clock.window()
    assert "communication_s" not in clock.totals()


def test_window_begins_anew_each_time() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=1, compute=1)
    clock.window()
    assert clock.window() == {}
    step(clock, hand, data=0, compute=7)
    assert clock.window()["step_s"] == 7.0


def test_measure_inner_takes_its_time_from_the_outer() -> None:
    hand = Hand()
    clock = StepClock(hand)
    with clock.measure("evaluation"):
        hand.pass_(1)
        with clock.measure("data"):
            hand.pass_(2)
            with clock.measure("data"):
                hand.pass_(4)
        hand.pass_(8)
    found = clock.totals()
    assert (found["evaluation_s"], found["data_s"], found["compute_s"]) == (9.0, 6.0, 0.0)


def test_measure_left_by_an_error_ends() -> None:
    hand = Hand()
    clock = StepClock(hand)
    with contextlib.suppress(ValueError), clock.measure("data"):
        hand.pass_(1)
        raise ValueError
    hand.pass_(2)
    assert clock.totals()["data_s"] == 1.0


def test_totals_add_up_to_the_wall_clock() -> None:
    hand = Hand()
    clock = StepClock(hand)
    for index in range(5):
        step(clock, hand, data=0.25, compute=1.5, communication=0.5)
        if index == 2:
            clock.window()
        with clock.measure("checkpoint"):
            hand.pass_(2)
    found = clock.totals()
    assert sum(found.values()) == hand.at - 100.0
    assert found["communication_s"] == 2.5


def test_totals_communication_never_exceeds_compute() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=0, compute=1, communication=3)
    assert clock.window()["compute_s"] == 0.0
    assert clock.totals()["compute_s"] == 0.0


def test_lap_gives_the_time_since_the_last() -> None:
    hand = Hand()
    clock = StepClock(hand)
    hand.pass_(3)
    assert clock.lap() == 3.0
    hand.pass_(1)
    assert clock.lap() == 1.0


def test_measure_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        StepClock().measure("lunch")


def test_measure_costs_next_to_nothing() -> None:
    clock = StepClock()
    begin = time.perf_counter()
    for _ in range(10_000):
        with clock.measure("data"):
            pass
    assert time.perf_counter() - begin < 0.5  # 50 microseconds each; measured: about 1


def test_window_whole_communication_is_beside_the_parts() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=1, compute=3, communication=0.5, whole=2.0)
    step(clock, hand, data=1, compute=3, communication=0.5, whole=1.0)
    found = clock.window()
    assert (found["communication_s"], found["communication_total_s"]) == (0.5, 1.5)
    assert found["data_s"] + found["compute_s"] + found["communication_s"] == found["step_s"]
    assert clock.communication_total_s() == 3.0
    step(clock, hand, data=1, compute=3, communication=0.5)
    assert "communication_total_s" not in clock.window()
    assert clock.communication_total_s() is None


def test_window_steps_nobody_measured_are_like_the_sample() -> None:
    hand = Hand()
    clock = StepClock(hand)
    step(clock, hand, data=1, compute=3)
    assert "communication_s" not in clock.window()
    clock.sampled = (0.5, 2.0)
    step(clock, hand, data=1, compute=3)
    clock.sampled = (0.25, 1.0)
    step(clock, hand, data=1, compute=3)
    found = clock.window()
    assert (found["communication_s"], found["communication_total_s"], found["compute_s"]) == (0.25, 1.0, 2.75)
    assert (clock.totals()["communication_s"], clock.communication_total_s()) == (0.75, 3.0)
    assert sum(clock.totals().values()) == hand.at - 100.0


def test_measure_is_a_phase_that_profilers_see() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def mark(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"/{name}")

    clock = StepClock()
    with clock.measure("data"):
        mark_phases(mark)  # begun before somebody looked: no end is seen either
    with clock.measure("evaluation"), clock.measure("data"):
        pass
    with clock.measure("checkpoint"):
        mark_phases(None)
    with clock.measure("hooks"):
        pass
    assert seen == ["evaluation", "data", "/data", "/evaluation", "checkpoint", "/checkpoint"]
