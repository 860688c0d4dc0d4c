"""Which pairs are measured when."""

from __future__ import annotations

import itertools

import pytest

from trainer.doctor.hosts import Layout
from trainer.doctor.pairs import Links, between_hosts, inside_hosts, rounds, slow_hosts_again, slow_ranks_again


def layout(*sizes: int) -> Layout:
    names = tuple(f"h{each}" for each in range(len(sizes)))
    return Layout(
        names=names, called=names, host_of=tuple(host for host, size in enumerate(sizes) for _ in range(size))
    )


@pytest.mark.parametrize("number", range(1, 14))
def test_rounds_meet_everybody_once_in_disjoint_pairs(number: int) -> None:
    members = [10 * each for each in range(number)]
    found = rounds(members)
    assert len(found) == {0: number - 1, 1: number}[number % 2] * (number > 1)  # odd: one rests in each
    assert sorted(pair for each in found for pair in each) == sorted(itertools.combinations(members, 2))
    for each in found:
        taken = [member for pair in each for member in pair]
        assert len(taken) == len(set(taken))


def test_plans_cover_every_rank_pair_of_a_host_and_every_host_pair() -> None:
    where = layout(2, 3, 1)
    inside = {pair for each in inside_hosts(where) for pair in each.items()}
    assert inside == {(0, 1), (1, 0), *itertools.permutations((2, 3, 4), 2)}
    between = {pair for each in between_hosts(where) for pair in each.items()}
    hosts = {(where.host_of[a], where.host_of[b]) for a, b in between}
    assert hosts == set(itertools.permutations(range(3), 2))
    assert {(0, 2), (1, 3), (2, 5)} <= between  # side by side, as far as both have ranks


def test_plans_of_one_rank_are_empty() -> None:
    assert [*inside_hosts(layout(1)), *between_hosts(layout(1)), *inside_hosts(layout(1, 1))] == []


def test_links_between_hosts_keep_the_quickest_round_trip() -> None:
    links = Links(
        hosts_gb_per_s={(0, 1): 3.0, (1, 0): 10.0},
        us={(0, 2): 9.0, (1, 3): 7.0, (2, 0): 8.0, (3, 1): 6.0, (0, 1): 1.0},
    )
    assert links.hosts_us(layout(2, 2)) == {(0, 1): 7.0, (1, 0): 6.0}


def test_again_repeats_only_what_is_slow_in_disjoint_rounds() -> None:
    pairs = list(itertools.permutations(range(4), 2))
    rates = {pair: 1.0 if pair[0] == 2 else 10.0 for pair in pairs}
    links = Links(gb_per_s=rates, hosts_gb_per_s=rates)
    expected = [{0: 2, 2: 0}, {1: 2, 2: 1}, {2: 3, 3: 2}]
    assert slow_ranks_again(links) == expected
    assert slow_hosts_again(layout(1, 1, 1, 1))(links) == expected
    assert slow_ranks_again(Links(gb_per_s=dict.fromkeys(pairs, 1.0))) == []
