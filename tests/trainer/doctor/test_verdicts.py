"""Who is named as slow, from rates alone."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from trainer.doctor.findings import Level
from trainer.doctor.verdicts import find_slow, judge_expected, judge_links, suspects, upper_median, usual_rate


def rates_of(
    number: int,
    *,
    sends: Collection[int] = (),
    receives: Collection[int] = (),
    links: Collection[tuple[int, int]] = (),
    noise: float = 0.0,
    seed: int = 0,
) -> dict[tuple[int, int], float]:
    """Rates around 10 GB/s, and a tenth where something is slow."""
    draw = random.Random(seed)
    return {
        (a, b): (1.0 if a in sends or b in receives or (a, b) in links else 10.0) * (1 - noise * draw.random())
        for a in range(number)
        for b in range(number)
        if a != b
    }


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 16, 33])
@pytest.mark.parametrize("seed", range(3))
def test_find_slow_with_equal_hosts_names_nobody(number: int, seed: int) -> None:
    rates = rates_of(number, noise=0.4, seed=seed)
    assert not find_slow(rates).any
    assert suspects(rates, 8) == []


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("seed", range(3))
def test_find_slow_sender_is_named_alone(number: int, seed: int) -> None:
    for slow in range(min(number, 4)):
        found = find_slow(rates_of(number, sends=[slow], noise=0.4, seed=seed))
        assert (set(found.senders), found.receivers, found.links) == ({slow}, {}, {})


@pytest.mark.parametrize("number", [3, 4, 5, 8])
def test_find_slow_receiver_and_both_sides_are_told_apart(number: int) -> None:
    receiver = find_slow(rates_of(number, receives=[1], noise=0.3))
    assert (receiver.senders, set(receiver.receivers), receiver.links) == ({}, {1}, {})
    both = find_slow(rates_of(number, sends=[1], receives=[1], noise=0.3))
    assert (set(both.senders), set(both.receivers), both.links) == ({1}, {1}, {})


@pytest.mark.parametrize("number", [3, 4, 8])
def test_find_slow_link_is_no_host(number: int) -> None:
    found = find_slow(rates_of(number, links=[(0, 2)], noise=0.3))
    assert (found.senders, found.receivers, set(found.links)) == ({}, {}, {(0, 2)})


def test_find_slow_from_few_rounds_blames_no_side_by_one_rate() -> None:
    rates = {(0, 1): 1.0, (1, 0): 10.0, (2, 3): 10.0, (3, 2): 9.0}
    found = find_slow(rates)
    assert (found.senders, found.receivers, set(found.links)) == ({}, {}, {(0, 1)})


def test_find_slow_nearly_half_of_the_hosts_are_named() -> None:
    assert set(find_slow(rates_of(9, sends=[1, 3, 5, 7], receives=[1, 3, 5, 7])).senders) == {1, 3, 5, 7}


def test_usual_rate_and_median() -> None:
    assert upper_median([1.0, 2.0]) == 2.0
    assert upper_median([3.0, 1.0, 2.0]) == 2.0
    assert usual_rate({(0, 1): 1.0, (1, 0): 9.0}) == 9.0


def test_suspects_slowest_first_and_few() -> None:
    rates = rates_of(6, sends=[1]) | {(2, 3): 0.1}
    assert suspects(rates, 2)[0] == (2, 3)
    assert len(suspects(rates, 2)) == 2


NAMES = [f"algo-{each}" for each in range(1, 9)]


def late(number: int) -> dict[tuple[int, int], float]:
    return dict.fromkeys(rates_of(number), 40.0)


def test_judge_links_two_hosts_names_the_sender_and_says_what_it_cannot_know() -> None:
    [finding] = judge_links("between hosts", rates_of(2, sends=[1]), late(2), NAMES, bits=True, only_warn=False)
    assert finding.level is Level.failure
    assert finding.where == ("algo-2",)
    assert "algo-2 is slow at sending: 8.00 Gbit/s, 10% of the usual 80.00 Gbit/s" in finding.what
    assert "the receiving side of algo-1 can only be told apart by a third" in finding.advice


@pytest.mark.parametrize(
    ("rates", "where", "words"),
    [
        (rates_of(4, sends=[2]), ("algo-3",), "sending"),
        (rates_of(4, receives=[2]), ("algo-3",), "receiving"),
        (rates_of(4, links=[(3, 0)]), ("algo-4", "algo-1"), "the link from algo-4 to algo-1"),
    ],
    ids=["sender", "receiver", "link"],
)
def test_judge_links_names_host_or_link(
    rates: dict[tuple[int, int], float], where: tuple[str, ...], words: str
) -> None:
    [finding] = judge_links("between hosts", rates, late(4), NAMES, bits=True, only_warn=False)
    assert (finding.level, finding.where) == (Level.failure, where)
    assert words in finding.what
    [warned] = judge_links("ranks of a host", rates, late(4), NAMES, bits=False, only_warn=True)
    assert warned.level is Level.warning


def test_judge_links_well_says_the_range_and_nothing_measured_says_nothing() -> None:
    [finding] = judge_links("between hosts", rates_of(3), late(3), NAMES, bits=False, only_warn=False)
    assert (finding.level, finding.what) == (Level.ok, "3 pairs, 10.00 GB/s to 10.00 GB/s each way, 40 µs")
    assert judge_links("between hosts", {}, {}, NAMES, bits=True, only_warn=False) == []


def test_judge_links_late_one_is_named() -> None:
    times = late(3) | {(0, 2): 900.0}
    found = judge_links("between hosts", rates_of(3), times, NAMES, bits=True, only_warn=False)
    assert [each.level for each in found] == [Level.warning, Level.ok]
    assert "algo-1 to algo-3 takes 900 µs, where 40 µs are usual" in found[0].what


@pytest.mark.parametrize(
    ("gb_per_s", "level"), [(45.0, Level.ok), (20.0, Level.warning), (1.2, Level.failure)], ids=str
)
def test_judge_expected_against_the_type(gb_per_s: float, level: Level) -> None:
    rates = {(0, 1): gb_per_s, (1, 0): gb_per_s}
    [finding] = judge_expected(rates, NAMES, 400.0, "p4d.24xlarge")
    assert finding.level is level
    assert f"{8 * gb_per_s / 400:.0%}" in finding.what
    assert judge_expected(rates, NAMES, None, "g6e.xlarge") == []
