"""What ZeRO sends in a step, read from DeepSpeed 0.19.8: near to it, not exact, where it depends on what computes when.

Gradients travel as they come, in buckets that never grow beyond their size. In stages 1 and 2 a bucket is all-reduced
whole, and each rank keeps its part (`use_multi_rank_bucket_allreduce`). In stage 3 weights are gathered module by
module with those of the next modules up to a size (`PartitionedParameterCoordinator`), and stay gathered where they
are used again soon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies._traffic import buckets, statistics, up_to
from strategies.base import Collective, ModelSpec, Plan, WorldSpec
from strategies.footprint import merged

_NUMBER = 4
"""Bytes: all that travels is fp32."""
ALIGNMENT = 2
"""Stages 1 and 2: what is cut is padded to so many numbers per rank (`nccl_start_alignment_factor`)."""
_REUSE = 10**9
"""Stage 3: weights that are used again within so many numbers stay gathered (`stage3_max_reuse_distance`)."""
PERSISTENT = 100_000
"""Stage 3: parameters of so many numbers or fewer stay gathered (`stage3_param_persistence_threshold`)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """In what numbers travel."""

    bucket: int
    """Numbers of gradients."""
    prefetch: int
    """Stage 3: numbers that are gathered ahead."""
    persistent: int = PERSISTENT
    near: int = 1
    """hpZ: ranks among which weights are gathered that were gathered in the same step before; 1: all."""
    sub_group: int = 10**9
    """Stage 3: numbers of a rank that are stepped at a time (`sub_group_size`)."""
    late: bool = False
    """Gradients are reduced at the end of a step, in stages 2 and 3 too."""


def sent(model: ModelSpec, world: WorldSpec, plan: Plan, stage: int, sizes: Sizes) -> tuple[Collective, ...]:
    """The collectives of one optimizer step."""
    key = ("zero", stage, sizes, world, plan.accumulation, plan.precision.master_dtype)
    return model.once(key, lambda: _sent(model, world, plan, stage, sizes))


def _sent(model: ModelSpec, world: WorldSpec, plan: Plan, stage: int, sizes: Sizes) -> tuple[Collective, ...]:
    reduced = [value.numel() for value in model.trained()] or [model.num_trainable]
    found = [*statistics(model, plan, world.size)]
    if stage == 3:
        found += _gatherings(model, world, plan, sizes)
    kind = "reduce_scatter" if stage == 3 else "all_reduce"
    for bucket in up_to(reduced, sizes.bucket):
        padded = sum(_padded(size, world.size) for size in bucket) if stage == 3 else sum(bucket)
        passes = 1 if stage == 1 or sizes.late else plan.accumulation
        found.append(_one(kind, padded, world.size, count=passes))
    if stage < 3:
        found.append(_one("all_gather", _padded(sum(reduced), world.size * ALIGNMENT), world.size, phase="step"))
    norm = torch.float64 if stage == 3 else torch.float32
    found.append(_one("all_reduce", norm.itemsize // _NUMBER, world.size, phase="step"))
    return merged(found)


def _gatherings(model: ModelSpec, world: WorldSpec, plan: Plan, sizes: Sizes) -> Iterator[Collective]:
    parameters = model.parameters
    cut: list[Tensor] = [value for value in parameters if value.numel() > sizes.persistent]
    if not parameters:
        cut = [torch.empty(model.num_parameters, device="meta", requires_grad=True)]
    ranks, passes = world.size, plan.accumulation
    near = sizes.near if sizes.near > 1 else ranks
    for group in _ahead(cut, sizes.prefetch):
        if near == ranks:
            yield _gathering(group, ranks, ranks, count=passes, phase="forward")
            continue
        # The first pass of a step makes the second copy; that of what isn't trained is never out of date.
        trained = [value for value in group if value.requires_grad]
        frozen = [value for value in group if not value.requires_grad]
        yield _gathering(trained, ranks, ranks, count=1, phase="forward")
        yield _gathering(frozen, ranks, near, count=1, phase="forward")
        yield _gathering(group, ranks, near, count=passes - 1, phase="forward")
    for group in _ahead(_released(cut), sizes.prefetch):
        yield _gathering(group, ranks, near, count=passes, phase="backward")
    for value in parameters:
        if value.numel() <= sizes.persistent:
            yield _gathering([value], ranks, ranks, count=1, phase="step")


def _ahead(parameters: list[Tensor], numbers: int) -> Iterator[list[Tensor]]:
    return buckets(parameters, [value.numel() for value in parameters], [numbers])


def _gathering(group: list[Tensor], ranks: int, among: int, *, count: int, phase: str) -> Collective:
    size = sum(_padded(value.numel(), ranks) for value in group)
    return _one("all_gather", size, among, count=count, phase=phase)


def _released(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Those that backward comes to so late that they weren't kept, in its order."""
    found, behind = [], 0
    for value in reversed(parameters):
        if 2 * behind >= _REUSE:
            found.append(value)
        behind += value.numel()
    return found


def kept_to_the_end(model: ModelSpec) -> int:
    """Numbers of weights that stay whole from forward to backward, since they are used again soon."""

    def count() -> int:
        total = sum(value.numel() for value in model.parameters)
        return total - sum(value.numel() for value in _released(model.parameters))

    return model.once("kept to the end", count)


def _padded(size: int, parts: int) -> int:
    return math.ceil(size / parts) * parts


def _one(kind: str, numbers: int, ranks: int, *, count: int = 1, phase: str = "backward") -> Collective:
    return Collective(kind=kind, payload_bytes=numbers * _NUMBER, count=count, ranks=ranks, phase=phase)
