"""What torch's `fully_shard` allocates in a step, counted through once: see `FSDPParamGroup` there.

Sizes are numbers of a parameter group: a block, or the rest of the model, which stays gathered from the forward
pass to the end of the backward one. Dim 0 of each parameter is padded to a multiple of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from strategies._blocks import find_blocks, with_own_parameters
from strategies.base import Collective, Footprint, ModelSpec, Plan


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
    return Cut(_part(rest, ranks), tuple(_part(list(block.parameters()), ranks) for block in blocks))


def _part(parameters: Sequence[nn.Parameter], ranks: int) -> Part:
    sizes = [(_padded(value, ranks), value.requires_grad) for value in parameters]
    return Part(sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained))


def _padded(value: nn.Parameter, ranks: int) -> int:
    rows = value.shape[0] if value.ndim else 1
    return math.ceil(rows / ranks) * ranks * math.prod(value.shape[1:])


def most_at_once(cut: Cut, *, ranks: int, prefetch: int, kept: float) -> int:
    """Numbers that a step takes at its peak besides what is kept between steps.

    Args:
        cut: the model.
        ranks: over which it is cut.
        prefetch: blocks gathered ahead.
        kept: share of a block that stays with a rank between forward and backward; 1: it isn't cut in between.
    """
    return math.ceil(max(_moments(cut, ranks, prefetch, kept)))


def _moments(cut: Cut, ranks: int, prefetch: int, kept: float) -> Iterator[float]:
    """The numbers in use at each moment at which they may be most."""
    rest, blocks = cut.rest, cut.blocks

    def gathered(first: int, last: int) -> int:
        """Buffers of gatherings whose result isn't copied to its place yet."""
        return sum(block.weights for block in blocks[max(first, 0) : last]) if ranks > 1 else 0

    buffer = 0 if ranks == 1 else 1
    yield rest.weights * (1 + buffer)
    for index, block in enumerate(blocks):
        before = sum(each.weights for each in blocks[:index]) * kept
        last = blocks[index - 1] if index else rest
        ahead = gathered(index + 1, index + 1 + prefetch) if prefetch > 1 else 0
        yield rest.weights + before + block.weights * (1 + buffer) + max(last.weights * buffer, ahead)
    reducing = 0
    for index, block in reversed([*enumerate(blocks)]):
        before = rest.weights + rest.gradients + sum(each.weights for each in blocks[:index]) * kept
        if kept < 1:
            before += gathered(index - prefetch, index)
        yield before + block.weights + block.gradients + reducing
        yield before + 2 * block.gradients  # and as they are sent
        reducing = block.gradients
    yield rest.weights + rest.gradients + reducing
    yield 2 * rest.gradients


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
    buffers = most_at_once(parts, ranks=ranks, prefetch=prefetch, kept=kept)
    if plan.accumulation > 1 and not reduce_every:
        buffers += parts.gradients - parts.gradients // ranks  # whole until they are parts
    sent, collectives = model.num_trainable * number, list[Collective]()
    if ranks > 1:
        gathers, reductions = plan.accumulation * (2 if kept < 1 else 1), plan.accumulation if reduce_every else 1
        payload = model.num_parameters * number
        collectives = [
            Collective(kind="all_gather", payload_bytes=payload, count=gathers, ranks=ranks),
            Collective(kind="reduce_scatter", payload_bytes=sent, count=reductions, ranks=ranks),
        ]
    if groups > 1:
        collectives.append(Collective(kind="all_reduce", payload_bytes=sent // ranks, count=1, ranks=groups))
    return Footprint(
        weights_bytes=weights,
        gradients_bytes=gradients,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=buffers * number,
        collectives=tuple(collectives),
        host_bytes=weights + gradients + moments if on_host else 0,
    )
