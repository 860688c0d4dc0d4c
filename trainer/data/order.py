"""In which order samples are drawn: a pure function of (seed, position), in memory that doesn't grow with the data.

A run's position is one number: the samples that all ranks have drawn so far. Nothing here knows
of ranks, workers or restarts, so none of them can change the order. All arithmetic is on unsigned
64-bit integers that wrap around, hence the same on every platform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from strategies.errors import ConfigError

Words: TypeAlias = NDArray[np.uint64]
Numbers: TypeAlias = NDArray[np.int64]

BLOCK = 1000
"""Positions after which the proportions of a mixture are exact again."""

_ROUNDS = 8
_SMALLEST_HALF = 2
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Streams of numbers that must not coincide though they come from the same seed.
_PERMUTATION, _PATTERN, _SAMPLE_SEED = 1, 2, 3


def _mix(words: Words) -> Words:
    """The finaliser of SplitMix64: a bijection in which every input bit moves every output bit.

    Source: Steele, Lea and Flood 2014, with the constants of Stafford's variant 13.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words(values: int | Numbers | Sequence[int]) -> Words:
    """Whole numbers, taken modulo 2**64, as an array of at least one dimension."""
    if isinstance(values, int):
        return np.array([values & _MASK], dtype=np.uint64)
    return np.atleast_1d(np.asarray(values, dtype=np.int64)).astype(np.uint64)


def _hash(*values: int | Numbers | Sequence[int]) -> Words:
    """One 64-bit number for each tuple of whole numbers; the arguments broadcast."""
    state = _words(len(values))
    for value in values:
        state = _mix((state + np.uint64(_GOLDEN)) ^ _mix(_words(value) + np.uint64(_GOLDEN)))
    return state


def _permute(indices: Numbers, size: int, keys: Words) -> Numbers:
    """Where a keyed permutation of `range(size)` sends each index.

    A Feistel network permutes a power of four that holds `size`; what lands outside walks on
    along its cycle until it is inside again, which keeps it a permutation.

    Args:
        indices: int64 [n], each in `range(size)`.
        size: > 0.
        keys: uint64 [n] or [1], the permutation that each index goes through.

    Returns:
        int64 [n].

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3.
    """
    half = np.uint64(max(_SMALLEST_HALF, math.ceil((size - 1).bit_length() / 2)))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(keys, indices.shape)
    rounds = [_mix(keys + np.uint64(_GOLDEN * (r + 1) & _MASK)) for r in range(_ROUNDS)]
    found = indices.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        value = found[walking]
        left, right = value >> half, value & low
        for key in rounds:
            left, right = right, left ^ (_mix(right + key[walking]) & low)
        found[walking] = (left << half) | right
        walking = walking[found[walking] >= np.uint64(size)]
    return found.astype(np.int64)


def seeds_for(seed: int, epochs: Numbers, indices: Numbers) -> list[int]:
    """`seed_for` of many samples at once."""
    return [int(word) for word in _hash(_SAMPLE_SEED, seed, epochs, indices) >> np.uint64(1)]


def seed_for(seed: int, epoch: int, index: int) -> int:
    """A number in [0, 2**63) for whatever is random about one sample in one epoch."""
    return seeds_for(seed, np.array([epoch]), np.array([index]))[0]


class Order:
    """An endless list of (index, epoch), of which any part can be computed on its own.

    With one source of n samples, positions 0..n-1 are its epoch 0, the next n its epoch 1, each in
    a permutation of its own. With several, every block of `BLOCK` positions draws from them in
    exact proportion to their weights, shuffled within the block, and each source goes through its
    own epochs.
    """

    def __init__(self, seed: int, sources: Sequence[tuple[int, float]], shuffle: bool = True) -> None:
        """Fix the order.

        Args:
            seed: any whole number.
            sources: (number of samples, weight) of each; their samples are numbered one after another.
            shuffle: False: each source in its own order.

        Raises:
            ConfigError: a source without samples, or a weight that isn't positive, or so small beside
                the others that the source would never be drawn.
        """
        self._seed = seed
        self._shuffle = shuffle
        self._sizes = np.array([size for size, _ in sources], dtype=np.int64)
        if not len(sources) or self._sizes.min() < 1:
            raise ConfigError(
                f"Order: the sources have {self._sizes.tolist()} samples, and one without samples can't be drawn "
                "from. Give each source enough text for one sample, or a smaller length (data.length)."
            )
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self._counts = _proportions([weight for _, weight in sources])
        self._block_pattern = functools.lru_cache(maxsize=8)(self._make_pattern)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_block_pattern"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._block_pattern = functools.lru_cache(maxsize=8)(self._make_pattern)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return int(self._sizes.sum())

    def at(self, position: int) -> tuple[int, int]:
        """The sample that is drawn at `position`: (index, epoch of its source)."""
        indices, epochs = self.span(position, position + 1)
        return int(indices[0]), int(epochs[0])

    def span(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        """`at` of `start` .. `stop` - 1.

        Returns:
            Indices and epochs, int64 [stop - start] each.
        """
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """`at` of each of `positions`, int64 [n].

        Returns:
            Indices and epochs, int64 [n] each.
        """
        sources, draws = self._draws(positions)
        sizes = self._sizes[sources]
        epochs, places = draws // sizes, draws % sizes
        indices = self._offsets[sources] + places
        if self._shuffle:
            for source in np.unique(sources):
                mine = sources == source
                keys = _hash(_PERMUTATION, self._seed, int(source), epochs[mine])
                indices[mine] = self._offsets[source] + _permute(places[mine], int(self._sizes[source]), keys)
        return indices, epochs

    def _draws(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Which source each position draws from, and how often that was drawn from before."""
        if len(self._sizes) == 1:
            return np.zeros_like(positions), positions
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        blocks = positions // BLOCK
        for block in np.unique(blocks):
            mine = blocks == block
            pattern, ranks = self._block_pattern(int(block))
            slots = positions[mine] % BLOCK
            sources[mine] = pattern[slots]
            draws[mine] = block * self._counts[pattern[slots]] + ranks[slots]
        return sources, draws

    def _make_pattern(self, block: int) -> tuple[Numbers, Numbers]:
        """The source of each slot of a block, and how many earlier slots have the same one."""
        slots = _permute(np.arange(BLOCK, dtype=np.int64), BLOCK, _hash(_PATTERN, self._seed, block))
        pattern = np.repeat(np.arange(len(self._counts)), self._counts)[slots]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, count in enumerate(self._counts):
            ranks[pattern == source] = np.arange(count)
        return pattern, ranks


def _proportions(weights: Sequence[float]) -> Numbers:
    """How many of `BLOCK` draws each weight gets, by largest remainder.

    Raises:
        ConfigError: a weight isn't a positive number, or gets no draw.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f"Order: the weights {list(weights)} are not all positive. "
            "Leave out what is not to be drawn (data.weights)."
        )
    shares = [weight / math.fsum(weights) * BLOCK for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: (counts[source] - shares[source], source))
    for source in by_remainder[: BLOCK - sum(counts)]:
        counts[source] += 1
    if min(counts) == 0:
        raise ConfigError(
            f"Order: weight {weights[counts.index(0)]:g} of {math.fsum(weights):g} is less than one draw in {BLOCK}. "
            "Give it more, or leave that source out (data.weights)."
        )
    return np.array(counts, dtype=np.int64)
