"""What torch's `fully_shard` sends in a step, counted through once: see `FSDPParamGroup` there (torch 2.13)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from strategies._traffic import statistics
from strategies.base import Collective, ModelSpec, Plan
from strategies.footprint import merged

if TYPE_CHECKING:
    from strategies._fsdp_memory import Cut


def sent(
    model: ModelSpec,
    plan: Plan,
    parts: Cut,
    *,
    ranks: int,
    groups: int,
    prefetch: int,
    kept: float,
    reduce_every: bool,
) -> tuple[Collective, ...]:
    """The collectives of one optimizer step.

    Args:
        model: what is trained.
        plan: how a step goes.
        parts: the model as it is cut.
        ranks: of a group, over which it is cut.
        groups: that hold the same.
        prefetch: blocks gathered ahead.
        kept: share of a block that stays with a rank between forward and backward; 1: it isn't cut in between.
        reduce_every: gradients are reduced after each micro-batch.
    """
    of_parts = _of_parts(
        parts, ranks, groups, plan.accumulation, plan.weights_dtype.itemsize, plan.precision.master_dtype.itemsize,
        prefetch=prefetch, kept=kept, reduce_every=reduce_every,
    )  # fmt: skip
    return merged([*of_parts, *_of_all(model, plan, ranks * groups)])


@functools.lru_cache(maxsize=64)
def _of_parts(
    parts: Cut, ranks: int, groups: int, passes: int, gathered: int, reduced: int,
    *, prefetch: int, kept: float, reduce_every: bool,
) -> tuple[Collective, ...]:  # fmt: skip
    """Of parameters, in `passes` micro-batches; `gathered`, `reduced`: bytes of a number on its way."""
    return merged(
        [
            *_gatherings(parts, ranks, passes, gathered, prefetch=prefetch, kept=kept),
            *_reductions(parts, ranks, groups, passes if reduce_every else 1, reduced),
        ]
    )


def _gatherings(
    parts: Cut, ranks: int, passes: int, number: int, *, prefetch: int, kept: float
) -> Iterator[Collective]:
    """Each part before its forward pass, and a block before its backward one if it was cut in between."""
    idle = parts.idle
    near = round(1 / kept) if kept else ranks
    # Backward gathers ahead without asking whether it will come to a block; the next forward pass finds such a one.
    ahead = min(prefetch if idle < len(parts.blocks) else 1, idle)
    for index, block in enumerate(parts.blocks if kept < 1 else ()):
        in_vain = idle - ahead <= index < idle
        yield _gathering(block.weights * number, 1 if in_vain else passes, ranks, "forward")
        if index >= idle or in_vain:
            yield _gathering(block.weights * number, passes, near, "backward")
    for part in (*(parts.blocks if kept == 1 else ()), parts.rest):
        yield _gathering(part.weights * number, passes, ranks, "forward")


def _gathering(size: int, count: int, ranks: int, phase: str) -> Collective:
    return Collective(kind="all_gather", payload_bytes=size, count=count, ranks=ranks, phase=phase)


def _reductions(parts: Cut, ranks: int, groups: int, passes: int, number: int) -> Iterator[Collective]:
    """Each part's gradients after its backward pass; between the groups once per step."""
    for part in (*parts.blocks, parts.rest):
        size = part.gradients * number
        yield Collective(kind="reduce_scatter", payload_bytes=size, count=passes, ranks=ranks)
        yield Collective(kind="all_reduce", payload_bytes=size // ranks, count=1, ranks=groups, stride=ranks)


def _of_all(model: ModelSpec, plan: Plan, size: int) -> Iterator[Collective]:
    """What `Shards` sends: the norm with who used what, and statistics before each micro-batch."""
    told = (1 + max(1, len(model.trained()))) * torch.float64.itemsize
    yield Collective(kind="all_reduce", payload_bytes=told, count=1, ranks=size, phase="step")
    yield from statistics(model, plan, size)
