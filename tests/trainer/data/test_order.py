from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.data.order import BLOCK, Order, seed_for, seeds_for

FIRST_ORDER = [846, 155, 163, 456, 850, 541, 320, 94, 48, 221]
FIRST_SEEDS = [6077098523600650020, 1021391074774431535]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(-(2**70), 2**70), size=st.integers(1, 3000), epoch=st.integers(0, 10**6))
def test_order_one_epoch_draws_each_sample_once(seed: int, size: int, epoch: int) -> None:
    indices, epochs = Order(seed, [(size, 1.0)]).span(epoch * size, (epoch + 1) * size)
    assert sorted(indices.tolist()) == list(range(size))
    assert set(epochs.tolist()) == {epoch}


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 10**9), count=st.integers(1, 50), seed=st.integers(0, 2**63))
def test_order_a_span_equals_its_positions_one_by_one(start: int, count: int, seed: int) -> None:
    order = Order(seed, [(7, 1.0), (1000, 2.5), (3, 0.1)])
    indices, epochs = order.span(start, start + count)
    assert list(zip(indices.tolist(), epochs.tolist(), strict=True)) == [order.at(start + i) for i in range(count)]


def test_order_epochs_and_seeds_and_sources_differ() -> None:
    first, second = (Order(1, [(500, 1.0)]).span(e * 500, (e + 1) * 500)[0] for e in (0, 1))
    other = Order(2, [(500, 1.0)]).span(0, 500)[0]
    assert (first == second).mean() < 0.05
    assert (first == other).mean() < 0.05
    indices, _ = Order(1, [(500, 1.0), (500, 1.0)]).span(0, 1000)
    assert (indices[indices < 500] == indices[indices >= 500] - 500).mean() < 0.05


def test_order_of_a_seed_never_changes() -> None:
    # Resuming relies on it: a run that began under an older version must go on in the same order.
    assert Order(0, [(1000, 1.0)]).span(995, 1005)[0].tolist() == FIRST_ORDER
    assert [seed_for(0, 0, 0), seed_for(7, 1, 123456)] == FIRST_SEEDS


def test_order_small_permutations_are_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for drawn in map(tuple, Order(5, [(3, 1.0)]).span(0, 18_000)[0].reshape(-1, 3).tolist()):
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6
    assert min(counts.values()) > 850
    assert max(counts.values()) < 1150


def test_order_neighbours_are_spread_over_the_data() -> None:
    indices = Order(0, [(1_000_000, 1.0)]).span(0, 20_000)[0].astype(float)
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.03
    assert abs(indices.mean() / 1e6 - 0.5) < 0.01


def test_order_without_shuffle_goes_from_front_to_back() -> None:
    indices, epochs = Order(9, [(5, 1.0)], shuffle=False).span(3, 12)
    assert indices.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert epochs.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_order_of_a_huge_source_is_immediate() -> None:
    index, epoch = Order(0, [(10**15, 1.0)]).at(5 * 10**15 + 17)
    assert epoch == 5
    assert 0 <= index < 10**15


def test_order_mixture_proportions_are_exact_in_each_block() -> None:
    order = Order(3, [(40, 0.5), (10_000, 0.3), (7, 0.2)])
    for block in (0, 1, 12345):
        indices, _ = order.span(block * BLOCK, (block + 1) * BLOCK)
        drawn = np.searchsorted([40, 10_040], indices, side="right")
        assert np.bincount(drawn).tolist() == [500, 300, 200]
    indices, _ = order.span(0, 100)  # and nearly so in a part of one
    assert 30 < (indices < 40).sum() < 70


def test_order_mixture_goes_through_each_source_in_epochs_of_its_own() -> None:
    sizes = [40, 333, 7]
    indices, epochs = Order(3, [(size, weight) for size, weight in zip(sizes, (5, 3, 2), strict=True)]).span(0, 5000)
    offset = 0
    for size in sizes:
        mine = (indices >= offset) & (indices < offset + size)
        drawn, rounds = indices[mine] - offset, epochs[mine]
        assert rounds.tolist() == (np.arange(len(drawn)) // size).tolist()
        whole = len(drawn) // size
        assert whole >= 1
        for epoch in range(whole):
            assert sorted(drawn[rounds == epoch].tolist()) == list(range(size))
        offset += size


def test_order_mixture_largest_remainder_uses_the_whole_block() -> None:
    indices, _ = Order(0, [(1, 1.0), (1, 1.0), (1, 1.0)]).span(0, BLOCK)
    assert np.bincount(indices).tolist() == [334, 333, 333]


@pytest.mark.parametrize(
    ("sources", "words"),
    [([], "samples"), ([(0, 1.0)], "samples"), ([(5, 1.0), (5, -1.0)], "positive"), ([(5, 1.0), (5, 1e-6)], "1000")],
)
def test_order_of_what_cannot_be_drawn_is_refused(sources: list[tuple[int, float]], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        Order(0, sources)
    assert "\n" not in str(error.value)


def test_seed_for_has_63_bits_and_hardly_repeats() -> None:
    epochs, indices = np.divmod(np.arange(20_000), 5_000)
    seeds = seeds_for(1, epochs, indices)
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63
    assert seeds[7_001] == seed_for(1, 1, 2_001)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds[:4_000]]).mean(axis=0)
    assert abs(bits - 0.5).max() < 0.05
