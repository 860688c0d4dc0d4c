"""What ZeRO takes on one rank, predicted."""

from __future__ import annotations

from strategies._zero_traffic import Sizes, kept_to_the_end, sent
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec

_NUMBER = 4
"""Bytes: masters and moments are fp32."""


def zero_footprint(
    model: ModelSpec,
    world: WorldSpec,
    plan: Plan,
    *,
    stage: int,
    sizes: Sizes,
    offloaded: bool,
    optimizer_on_nvme: bool = False,
    weights_on_nvme: bool = False,
) -> Footprint:
    """Bytes on one rank and the collectives of a step.

    Args:
        model: what is trained.
        world: the ranks.
        plan: of a step.
        stage: of ZeRO.
        sizes: in what numbers travel.
        offloaded: masters and moments are in host memory.
        optimizer_on_nvme: they are on NVMe.
        weights_on_nvme: weights too.
    """
    number, ranks = plan.weights_dtype.itemsize, world.size
    trained, whole, gradients = (
        model.num_trainable * _NUMBER,
        model.num_parameters * number,
        model.num_trainable * number,
    )
    masters, moments = trained // ranks, int(trained * model.slots_per_parameter) // ranks
    ahead = min(whole, (sizes.prefetch + kept_to_the_end(model)) * number) if stage == 3 and ranks > 1 else 0
    collectives = sent(model, world, plan, stage, sizes)
    copied = sum(2 * each.payload_bytes * each.count for each in collectives if each.phase != "step")
    return Footprint(
        weights_bytes=(whole // ranks if stage == 3 else whole) + masters,
        gradients_bytes=gradients if stage == 1 else gradients // ranks,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=2 * min(gradients, sizes.bucket * number) + ahead,
        collectives=collectives,
        copied_bytes=copied,  # into buckets and out of them
        host_bytes=masters + moments if offloaded else 0,
        nvme_bytes=(masters + moments if optimizer_on_nvme else 0) + (whole // ranks if weights_on_nvme else 0),
    )
