"""What torch's `fully_shard` allocates in a step, counted through once: see `FSDPParamGroup` there.

Sizes are numbers of a parameter group: a block, or the rest of the model, which stays gathered from the forward
pass to the end of the backward one. Dim 0 of each parameter is padded to a multiple of the ranks.
"""

from __future__ import annotations

import functools
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
    head: int = 0
    """Of the rest's gradients, those that backward has before it comes to the blocks."""
    stages: tuple[int, ...] = (0,)
    """For each stage of a forward pass through all blocks of the model, the one of these blocks' that it is a part of:
    a block that shares a parameter belongs to the rest."""
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
    outline, named = spec.outline, (tuple(wrap), wrap_parameters)
    rest, behind, blocks, stages, idle = spec.once(("parts", *named), lambda: _parts(outline, wrap, wrap_parameters))
    return spec.once(
        ("cut", *named, ranks),
        lambda: Cut(
            _part(rest, ranks),
            tuple(_part(block, ranks) for block in blocks),
            _part(behind, ranks).gradients,
            stages,
            idle,
        ),
    )


def _parts(
    outline: nn.Module, wrap: Sequence[str], wrap_parameters: int | None
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[list[nn.Parameter]], tuple[int, ...], int]:
    """The parameters outside all blocks, those behind them, those of each, its stages, and how many are idle."""
    found = find_blocks(outline, wrap, wrap_parameters)
    blocks = with_own_parameters(outline, found)
    inside = {id(value) for block in blocks for value in block.parameters()}
    rest = [value for value in outline.parameters() if id(value) not in inside]
    each = [list(block.parameters()) for block in blocks]
    return rest, _behind(outline, inside), each, _stages(found, blocks), _idle(outline, blocks)


def _stages(found: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    own, stages = {id(block) for block in blocks}, [0]
    for block in found:
        last = stages[-1]
        stages += [last + 1, last + 2] if id(block) in own else [last, last]
    return tuple(stages)


def _behind(model: nn.Module, inside: set[int]) -> list[nn.Parameter]:
    """Parameters that the model names, also by another name, after its last block, those `inside` which are given."""
    found: dict[int, nn.Parameter] = {}
    for _, value in model.named_parameters(remove_duplicate=False):
        if id(value) in inside:
            found.clear()
        else:
            found[id(value)] = value
    return list(found.values())


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


@dataclass(frozen=True)
class Besides:
    """Bytes that a step takes besides what is kept between steps."""

    stages: tuple[int, ...]
    """`Footprint.beside` of a model with all its blocks, without the whole gradients of the stage itself."""
    end: int
    """When backward is through: the rest's gradients, and as they are sent."""
    most: int
    """Of both, a stage's own gradients among them."""


@functools.lru_cache(maxsize=64)
def besides(
    cut: Cut, *, ranks: int, prefetch: int, kept: float, gathered: int, reduced: int, again: bool = False
) -> Besides:
    """What there is at each stage.

    Args:
        cut: the model.
        ranks: over which it is cut.
        prefetch: blocks gathered ahead.
        kept: share of a block that stays with a rank between forward and backward; 1: it isn't cut in between.
        gathered: bytes of a number of a part that is whole.
        reduced: bytes of a number on its way to the other ranks.
        again: another micro-batch of the step was reduced before, whose last message is let go of by the next one.
    """
    widened, rest = reduced / gathered, cut.rest
    found = [0] * (4 * len(cut.blocks) + 2)
    # What is gathered first is copied once, too: then, as in the end, there are no activations.
    end = most = max(rest.weights * (1 if ranks == 1 else 2), (1 + widened) * rest.gradients)
    for stage, numbers, own in _moments(cut, ranks, prefetch, kept, widened, widened * rest.gradients * again):
        found[stage] = max(found[stage], math.ceil(numbers * gathered))
        most = max(most, numbers + own)
    last = len(found) - 1
    return Besides(
        (*(found[stage] for stage in cut.stages), *(found[last - stage] for stage in reversed(cut.stages))),
        math.ceil(end * gathered),
        math.ceil(most * gathered),
    )


def _moments(
    cut: Cut, ranks: int, prefetch: int, kept: float, widened: float, pending: float
) -> Iterator[tuple[int, float, int]]:
    """The numbers in use at each moment at which they may be most, with its stage, and its own whole gradients.

    `widened`: numbers of a gradient as it is sent; `pending`: of what was sent last and isn't let go of.
    """
    rest, blocks = cut.rest, cut.blocks
    last_stage = 2 * len(blocks)

    def behind(stage: int) -> int:
        """The same stage in backward, which runs through them from the last."""
        return 2 * last_stage + 1 - stage

    def ahead_of(first: int, last: int) -> int:
        """Buffers of gatherings whose result isn't copied to its place yet."""
        return sum(block.weights for block in blocks[max(first, 0) : last]) if ranks > 1 else 0

    buffer = 0 if ranks == 1 else 1
    there = rest.weights + pending
    yield 0, there, 0
    for index, block in enumerate(blocks):
        last = blocks[index - 1] if index else rest
        ahead = ahead_of(index + 1, index + 1 + prefetch) if prefetch > 1 else 0
        in_use = there + block.weights * (1 + buffer)
        yield 2 * index, in_use + max(last.weights * buffer, ahead), 0  # what it begins with
        yield 2 * index + 1, in_use + ahead, 0
        there += block.weights * kept
        yield 2 * index + 2, there + block.weights * buffer, 0
    # The head's gradient, and the last block gathered again, come when the loss is gone, and are of the next stage.
    yield behind(last_stage), there, 0
    there += cut.head - pending
    reducing = pending
    for index, block in reversed([*enumerate(blocks)]):
        there -= block.weights * kept
        ahead = ahead_of(index - prefetch, index) if kept < 1 else 0
        yield behind(2 * index + 1), there + ahead + block.weights + reducing, block.gradients
        reducing = block.gradients * widened
        yield behind(2 * index + 1), there + ahead + reducing, block.gradients  # as they are sent
        yield behind(2 * index), there + ahead + reducing, 0
    if blocks:
        yield behind(0), there + reducing, 0


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
    again = plan.accumulation > 1
    step = besides(
        parts,
        ranks=ranks,
        prefetch=prefetch,
        kept=kept,
        gathered=gathered,
        reduced=number,
        again=again and reduce_every,
    )
    # Added up whole until the last micro-batch, beside the parts that they become.
    whole = (parts.gradients - parts.gradients // ranks) * number if again and not reduce_every else 0
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
        gradients_come=not again,
        gradients_whole_first=not whole,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=step.most + whole,
        beside=tuple(each + whole for each in step.stages),
        step_bytes=step.end,
        collectives=collectives,
        copied_bytes=_copied(collectives, gathered, number),
        host_bytes=weights + gradients + moments if on_host else 0,
    )


def _copied(collectives: Sequence[Collective], gathered: int, reduced: int) -> int:
    """What is gathered goes from one buffer to its places, and gradients to another, as the numbers that travel."""
    out = sum(2 * each.payload_bytes * each.count for each in collectives if each.kind == "all_gather")
    back = sum(each.payload_bytes * each.count for each in collectives if each.kind == "reduce_scatter")
    return out + back + back * gathered // reduced
