"""From an order of samples to micro-batches: what one rank gets in each optimizer step."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.data.base import Collate, Samples
from trainer.data.order import Order, seeds_for
from trainer.data.streams import Key, open_stream

_AT_ONCE = 256


@dataclass(kw_only=True)
class _RankKeys(Iterable[list[Key]]):
    """A batch sampler: the keys of one rank's micro-batches from `position` on, without end."""

    order: Order
    seed: int
    global_batch: int
    micro_batch: int
    share: int
    """Samples of the global batch that are this rank's."""
    data_rank: int
    position: int = 0

    def __iter__(self) -> Iterator[list[Key]]:
        steps = max(1, _AT_ONCE // self.share)  # the order of a few hundred costs no more than that of one
        mine = np.arange(self.share) + self.global_batch * np.arange(steps)[:, None] + self.data_rank * self.share
        for start in itertools.count(self.position, steps * self.global_batch):
            indices, epochs = self.order.take(start + mine.ravel())
            keys = list(zip(indices.tolist(), seeds_for(self.seed, epochs, indices), strict=True))
            yield from (keys[at : at + self.micro_batch] for at in range(0, len(keys), self.micro_batch))


def accumulation_of(global_batch: int, micro_batch: int, data_size: int) -> int:
    """Micro-batches of one rank in one optimizer step.

    Raises:
        ConfigError: `global_batch` is no multiple of `micro_batch` times `data_size`.
    """
    at_once = micro_batch * data_size
    if micro_batch < 1 or global_batch < 1:
        raise ConfigError(
            f"Loader: global_batch={global_batch} and micro_batch={micro_batch} must be at least 1. "
            "Count samples (trainer.global_batch, trainer.micro_batch)."
        )
    if global_batch % at_once == 0:
        return global_batch // at_once
    below, above = global_batch // at_once * at_once, (global_batch // at_once + 1) * at_once
    batches = " or ".join(str(value) for value in (below, above) if value)
    divisors = [m for m in range(1, global_batch + 1) if global_batch % (m * data_size) == 0]
    micro = f", or micro_batch={_list(divisors)} (trainer.micro_batch)" if divisors else ""
    raise ConfigError(
        f"Loader: global_batch={global_batch} is not a multiple of micro_batch={micro_batch} times {data_size} "
        f"data-parallel ranks. Use global_batch={batches} (trainer.global_batch){micro}."
    )


def _list(values: Sequence[int]) -> str:
    shown = [str(value) for value in values]
    if len(shown) > 6:
        shown = [*shown[:3], "...", *shown[-2:]]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


class Loader:
    """One rank's micro-batches, step by step, from any position on."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        collate: Collate,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Settle who reads what; workers start with the first batch.

        Args:
            samples: picklable where there are workers.
            order: over `samples`.
            collate: from samples and their seeds to a batch; picklable where there are workers.
            seed: for the samples' seeds.
            global_batch: samples of one optimizer step over all ranks.
            micro_batch: samples that one rank takes at a time.
            data_rank: of `data_size` ranks, each of which takes a contiguous share of the global batch.
            data_size: number of ranks that take different samples.
            workers: processes that prepare batches; 0: this one.
            pin_memory: copy batches to pinned memory, if there is an accelerator.

        Raises:
            ConfigError: `global_batch` can't be cut that way, or `workers` is negative.
        """
        if workers < 0:
            raise ConfigError(f"Loader: workers={workers} is negative. Use 0 or more (data.workers).")
        self.accumulation = accumulation_of(global_batch, micro_batch, data_size)
        self.global_batch = global_batch
        self._keys = _RankKeys(
            order=order,
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            share=micro_batch * self.accumulation,
            data_rank=data_rank,
        )
        self._stream = open_stream(samples, collate, self._keys, workers, pin_memory)

    def steps(self, position: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of one optimizer step after another, without end.

        Ends whatever an earlier call began: a loader gives one stream of steps at a time.

        Args:
            position: samples that all ranks have consumed so far.
        """
        self._keys.position = position
        batches = iter(self._stream)
        while True:
            yield [next(batches) for _ in range(self.accumulation)]

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._stream.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    samples: Samples,
    collate: Collate,
    *,
    micro_batch: int,
    data_rank: int = 0,
    data_size: int = 1,
    seed: int = 0,
    limit: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's part of one pass over `samples`: each sample on exactly one rank.

    Every rank gets equally many batches: those that run out get weightless ones.

    Args:
        samples: what to go over, in order.
        collate: as for `Loader`.
        micro_batch: largest number of samples in a batch; the last may have fewer.
        data_rank: of `data_size` ranks.
        data_size: number of ranks that share the pass.
        seed: the samples' seeds follow from it and their index, the same in every pass.
        limit: go over that many samples only, evenly spread over all, always the same ones.
        workers: processes that prepare batches; 0: this one.

    Raises:
        ConfigError: `limit` or `micro_batch` is below 1.
    """
    if micro_batch < 1 or (limit is not None and limit < 1):
        raise ConfigError(
            f"Evaluation: micro_batch={micro_batch} and limit={limit} must be at least 1. "
            "Raise them (trainer.micro_batch, trainer.eval_samples)."
        )
    num_samples = len(samples)
    chosen = num_samples if limit is None else min(limit, num_samples)
    num_batches = math.ceil(math.ceil(chosen / data_size) / micro_batch)
    begin, end = data_rank * chosen // data_size, (data_rank + 1) * chosen // data_size
    indices = np.arange(begin, end, dtype=np.int64) * num_samples // max(chosen, 1)
    return _evaluation(samples, collate, indices, num_batches, micro_batch, seed, workers)


def _evaluation(
    samples: Samples,
    collate: Collate,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    num_batches: int,
    micro_batch: int,
    seed: int,
    workers: int,
) -> Iterator[Batch]:
    keys = list(zip(indices.tolist(), seeds_for(seed, np.zeros_like(indices), indices), strict=True))
    parts = [keys[at : at + micro_batch] for at in range(0, len(keys), micro_batch)]
    stream = open_stream(samples, collate, parts, min(workers, len(parts)))
    with contextlib.closing(stream):
        yield from stream
    for _ in range(num_batches - len(parts)):
        yield collate([samples[0]], [0]).weightless()
