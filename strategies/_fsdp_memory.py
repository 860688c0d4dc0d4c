"""What torch's `fully_shard` allocates in a step, counted through once: see `FSDPParamGroup` there.

Sizes are numbers of a parameter group: a block, or the rest of the model, which stays gathered from the forward
pass to the end of the backward one. Dim 0 of each parameter is padded to a multiple of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from strategies._fsdp_traffic import sent
from strategies.base import Collective, Footprint, ModelSpec, Plan
from strategies.blocks import find_blocks, with_own_parameters


@dataclass(frozen=True)
class Part:
    """What is gathered and reduced together."""

    weights: int
    """Numbers, padded."""
    gradients: int
    """Those that are trained."""


@dataclass(frozen=True)
class Cut:
    """A model as it is cut."""

    rest: Part
    blocks: tuple[Part, ...]
    idle: int = 0
    """Blocks at the beginning that backward doesn't come to, since nothing in them or before them is trained."""

    @property
    def weights(self) -> int:
        """Of all parts."""
        return self.rest.weights + sum(block.weights for block in self.blocks)

    @property
    def gradients(self) -> int:
        """Of all parts."""
        return self.rest.gradients + sum(block.gradients for block in self.blocks)


def cut(spec: ModelSpec, ranks: int, wrap: Sequence[str], wrap_parameters: int | None) -> Cut:
    """The parts of a model over `ranks`, by the settings of the same names.

    Raises:
        ConfigError: the model has no module of a class in `wrap`.
    """
    if spec.outline is None:
        whole = Part(math.ceil(spec.num_parameters / ranks) * ranks, math.ceil(spec.num_trainable / ranks) * ranks)
        return Cut(whole, ())
    blocks = with_own_parameters(spec.outline, find_blocks(spec.outline, wrap, wrap_parameters))
    inside = {id(value) for block in blocks for value in block.parameters()}
    rest = [value for value in spec.outline.parameters() if id(value) not in inside]
    return Cut(
        _part(rest, ranks),
        tuple(_part(list(block.parameters()), ranks) for block in blocks),
        _idle(spec.outline, blocks),
    )


def _idle(model: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Blocks before the first trained parameter, by the model's own order, which is taken for that of computing."""
    owner = {id(value): index for index, block in enumerate(blocks) for value in block.parameters()}
    seen: set[int] = set()
    for value in model.parameters():
        if value.requires_grad:
            return owner.get(id(value), len(seen))
        if id(value) in owner:
            seen.add(owner[id(value)])
    return len(blocks)


def _part(parameters: Sequence[nn.Parameter], ranks: int) -> Part:
    sizes = [(_padded(value, ranks), value.requires_grad) for value in parameters]
    return Part(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def _padded(value: nn.Parameter, ranks: int) -> int:
    rows = value.shape[0] if value.ndim else 1
    return math.ceil(rows / ranks) * ranks * math.prod(value.shape[1:])


def beside_stages(cut: Cut, *, ranks: int, prefetch: int, kept: float, gathered: int, reduced: int) -> tuple[int, ...]:
    """Bytes that a step takes besides what is kept between steps, at each stage (`Footprint.beside`).

    Args:
        cut: the model.
        ranks: over which it is cut.
        prefetch: blocks gathered ahead.
        kept: share of a block that stays with a rank between forward and backward; 1: it isn't cut in between.
        gathered: bytes of a number of a part that is whole.
        reduced: bytes of a number on its way to the other ranks.
    """
    stages = 2 * len(cut.blocks) + 1
    found = [0] * (2 * stages)
    for stage, numbers in _moments(cut, ranks, prefetch, kept, reduced / gathered):
        found[stage] = max(found[stage], math.ceil(numbers * gathered))
    return tuple(found)


def _moments(cut: Cut, ranks: int, prefetch: int, kept: float, widened: float) -> Iterator[tuple[int, float]]:
    """The numbers in use at each moment at which they may be most, with its stage; `widened`: of gradients as sent."""
    rest, blocks = cut.rest, cut.blocks
    last_stage = 2 * len(blocks)

    def behind(stage: int) -> int:
        """The same stage in backward, which runs through them from the last."""
        return 2 * last_stage + 1 - stage

    def ahead_of(first: int, last: int) -> int:
        """Buffers of gatherings whose result isn't copied to its place yet."""
        return sum(block.weights for block in blocks[max(first, 0) : last]) if ranks > 1 else 0

    buffer = 0 if ranks == 1 else 1
    yield 0, rest.weights * (1 + buffer)
    before = 0.0
    for index, block in enumerate(blocks):
        last = blocks[index - 1] if index else rest
        ahead = ahead_of(index + 1, index + 1 + prefetch) if prefetch > 1 else 0
        yield 2 * index + 1, rest.weights + before + block.weights * (1 + buffer) + max(last.weights * buffer, ahead)
        before += block.weights * kept
        yield 2 * index + 2, rest.weights + before + block.weights * buffer
    reducing = 0.0
    in_advance = ahead_of(len(blocks) - prefetch, len(blocks)) if kept < 1 else 0
    yield behind(last_stage), rest.weights + rest.gradients + before + in_advance
    for index, block in reversed([*enumerate(blocks)]):
        before -= block.weights * kept
        there = rest.weights + rest.gradients + before
        if kept < 1:
            there += ahead_of(index - prefetch, index)
        yield behind(2 * index + 1), there + block.weights + block.gradients + reducing
        yield behind(2 * index + 1), there + (1 + widened) * block.gradients  # and as they are sent
        reducing = block.gradients * widened
        yield behind(2 * index), there + reducing
    yield behind(0), rest.weights + rest.gradients + reducing
    yield behind(0), (1 + widened) * rest.gradients


def predicted(
    model: ModelSpec,
    plan: Plan,
    parts: Cut,
    *,
    ranks: int,
    groups: int = 1,
    prefetch: int = 1,
    kept: float = 0.0,
    reduce_every: bool = True,
    on_host: bool = False,
) -> Footprint:
    """The footprint of a rank.

    Args:
        model: what is trained.
        plan: how a step goes.
        parts: the model as it is cut.
        ranks: of a group, over which it is cut.
        groups: that hold the same.
        prefetch: blocks gathered ahead.
        kept: share of a block that stays with a rank between forward and backward.
        reduce_every: gradients are reduced after each micro-batch.
        on_host: what is kept between steps lies in host memory.
    """
    number = plan.precision.master_dtype.itemsize
    weights, gradients = (numbers * number // ranks for numbers in (parts.weights, parts.gradients))
    moments = int(gradients * model.slots_per_parameter)
    gathered = plan.weights_dtype.itemsize
    beside = beside_stages(parts, ranks=ranks, prefetch=prefetch, kept=kept, gathered=gathered, reduced=number)
    if plan.accumulation > 1 and not reduce_every:  # whole until they are parts
        beside = tuple(each + (parts.gradients - parts.gradients // ranks) * number for each in beside)
    collectives = sent(
        model,
        plan,
        parts,
        ranks=ranks,
        groups=groups,
        prefetch=prefetch,
        kept=kept,
        reduce_every=reduce_every,
    )
    return Footprint(
        weights_bytes=weights,
        gradients_bytes=gradients,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=max(beside),
        beside=beside,
        collectives=collectives,
        copied_bytes=_copied(collectives, gathered, number),
        host_bytes=weights + gradients + moments if on_host else 0,
    )


def _copied(collectives: Sequence[Collective], gathered: int, reduced: int) -> int:
    """What is gathered goes from one buffer to its places, and gradients to another, as the numbers that travel."""
    out = sum(2 * each.payload_bytes * each.count for each in collectives if each.kind == "all_gather")
    back = sum(each.payload_bytes * each.count for each in collectives if each.kind == "reduce_scatter")
    return out + back + back * gathered // reduced
