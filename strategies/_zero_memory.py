"""What ZeRO takes on one rank, predicted: counted after what DeepSpeed 0.19.8 allocates, and held against it by tests.

Stages 1 and 2 lay the trained parameters of a group end to end, and cut the row. A parameter that lies on a cut is in
two partitions, each of which keeps its gradient whole. Stage 3 cuts each parameter, and pads it. Masters are apart from
fp32 weights too, in all stages: stage 3 would share them, but compares a device with a device's name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from strategies._deepspeed_fields import Offload
from strategies._zero_traffic import ALIGNMENT, Sizes, kept_to_the_end, sent
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec

_NUMBER = 4
"""Bytes: masters and moments are fp32."""


@dataclass(frozen=True, kw_only=True)
class Lies:
    """Where a rank's parts lie between uses."""

    optimizer: Offload = Offload.none
    """Masters, moments, and gradients before the step."""
    weights: Offload = Offload.none
    """Stage 3."""


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """Of one rank, padding included."""

    trained: int
    """Of its partition."""
    weights: int
    """Of its partition, or of all, with what is frozen."""
    spanned: int
    """Stages 1 and 2: of all parameters that its partition has a part of; the most of any rank."""
    whole: int
    """Stage 3: of parameters that stay gathered between steps."""
    second: int
    """hpZ: of a second copy of those trained ones that don't stay gathered, from a step's first forward pass on."""
    second_frozen: int
    """hpZ: of a second copy of the frozen ones, which is kept."""


def _numbers(model: ModelSpec, ranks: int, stage: int, sizes: Sizes) -> _Numbers:
    parameters = model.parameters
    trained = [value.numel() for value in parameters if value.requires_grad] or [model.num_trainable]
    frozen = [value.numel() for value in parameters if not value.requires_grad]
    if not parameters:
        frozen = [model.num_parameters - model.num_trainable]
    if stage < 3:
        share = math.ceil(sum(trained) / (ranks * ALIGNMENT)) * ALIGNMENT
        spanned = _spanned(trained, share) if parameters else share
        padded = share * ranks + sum(frozen)
        return _Numbers(trained=share, weights=padded, spanned=spanned, whole=0, second=0, second_frozen=0)
    share, rest = (sum(math.ceil(size / ranks) for size in kind) for kind in (trained, frozen))
    stays = sum(value.numel() for value in parameters if value.numel() <= sizes.persistent)
    copies = ranks // sizes.near if sizes.near > 1 else 0
    cut = sum(math.ceil(size / ranks) for size in trained if size > sizes.persistent)
    return _Numbers(
        trained=share,
        weights=share + rest,
        spanned=share,
        whole=stays if ranks > 1 else 0,
        second=cut * copies,
        second_frozen=rest * copies,
    )


def _spanned(sizes: list[int], share: int) -> int:
    """Numbers of the parameters that a partition of `share` numbers has a part of, where they are most."""
    if not share:
        return 0
    changes: dict[int, int] = {}
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        if size:
            first, last = (end - size) // share, (end - 1) // share
            changes[first] = changes.get(first, 0) + size
            changes[last + 1] = changes.get(last + 1, 0) - size
    return max(accumulate(changes[rank] for rank in sorted(changes)), default=0)


def zero_footprint(
    model: ModelSpec, world: WorldSpec, plan: Plan, *, stage: int, sizes: Sizes, lies: Lies, overlaps: bool = True
) -> Footprint:
    """Bytes on one rank and the collectives of a step.

    Args:
        model: what is trained.
        world: the ranks.
        plan: of a step.
        stage: of ZeRO.
        sizes: in what numbers travel.
        lies: where a rank's parts lie.
        overlaps: gradients are reduced beside backward.
    """
    number = plan.weights_dtype.itemsize
    numbers = _numbers(model, world.size, stage, sizes)
    masters, moments = numbers.trained * _NUMBER, int(numbers.trained * _NUMBER * model.slots_per_parameter)
    kept = _cut_weights if stage == 3 else _whole_weights
    found = kept(model, world.size, plan, numbers, sizes, lies, stage)
    if stage < 3:
        found.buffers += (2 if overlaps else 1) * sizes.bucket * number
    if lies.optimizer is Offload.cpu:
        found.host += masters + moments
    elif lies.optimizer is Offload.nvme:
        found.nvme += masters + moments
    collectives = sent(model, world, plan, stage, sizes)
    copied = sum(2 * each.payload_bytes * each.count for each in collectives if each.phase != "step")
    return Footprint(
        weights_bytes=found.weights + masters,
        gradients_bytes=found.gradients,
        stepped_bytes=masters,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=found.buffers,
        step_bytes=found.step,
        collectives=collectives,
        copied_bytes=copied,  # into buckets and out of them
        host_bytes=found.host,
        nvme_bytes=found.nvme,
    )


@dataclass(kw_only=True)
class _Kept:
    """Bytes, without masters and moments."""

    weights: int
    gradients: int
    buffers: int
    step: int
    host: int = 0
    """Of these, in host memory."""
    nvme: int = 0


def _whole_weights(
    model: ModelSpec, ranks: int, plan: Plan, numbers: _Numbers, sizes: Sizes, lies: Lies, stage: int
) -> _Kept:
    """Stages 1 and 2, without their buckets."""
    number, weights = plan.weights_dtype.itemsize, numbers.weights * plan.weights_dtype.itemsize
    is_added_up = plan.accumulation > 1
    # Stage 1 adds whole gradients up; a cast model's always, for lack of a row to add them to.
    stays = is_added_up or (stage == 1 and plan.cast_weights)
    unreduced = model.num_trainable * number if sizes.late or (stage == 1 and stays) else 0
    whole, passing = (unreduced, 0) if stays else (0, unreduced)
    to_step = numbers.trained * _NUMBER
    if lies.optimizer is Offload.none:
        # A cast model's are added up in fp32, in a row of their own that is stepped; else whole tensors are kept.
        reduced = (numbers.trained if plan.cast_weights else numbers.spanned) * number
        return _Kept(
            weights=weights,
            gradients=max(reduced, whole),
            buffers=passing + (reduced if whole else 0),
            step=0 if plan.cast_weights else to_step,
        )
    on_host = to_step + (numbers.spanned * number if is_added_up else 0)
    way_back = numbers.trained * number
    return _Kept(
        weights=weights + way_back,
        gradients=on_host + whole,
        buffers=passing + 2 * model.largest_gradient * number,
        step=0,
        host=on_host + way_back,
    )


def _cut_weights(
    model: ModelSpec, ranks: int, plan: Plan, numbers: _Numbers, sizes: Sizes, lies: Lies, stage: int
) -> _Kept:
    """Stage 3."""
    number, to_step = plan.weights_dtype.itemsize, numbers.trained * _NUMBER
    whole, bucket = model.num_trainable * number, sizes.bucket * number
    unreduced, is_added_up = whole if sizes.late else 0, plan.accumulation > 1
    ahead = min(model.num_parameters - numbers.whole, sizes.prefetch + kept_to_the_end(model)) if ranks > 1 else 0
    found = _Kept(
        weights=(numbers.weights + numbers.whole + numbers.second_frozen) * number,
        gradients=numbers.trained * number + (unreduced if is_added_up else 0),
        # A bucket is there always, and joined once more as it is sent.
        buffers=bucket + min(whole, bucket) + (ahead + numbers.second) * number + (0 if is_added_up else unreduced),
        step=min(sizes.sub_group, numbers.trained) * _NUMBER,
    )
    if lies.optimizer is not Offload.none:
        # DeepSpeed adds up in one row in host memory, and copies it to another that is stepped.
        found.host += numbers.trained * number
        found.gradients += to_step
        found.step = 0
        if lies.optimizer is Offload.cpu:
            found.host += to_step
        else:
            found.nvme += to_step
    if lies.weights is not Offload.none:
        found.host += (numbers.second + numbers.second_frozen) * number
        if lies.weights is Offload.cpu:
            found.host += numbers.weights * number
        else:
            found.nvme += numbers.weights * number
    return found
