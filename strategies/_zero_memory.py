"""What ZeRO takes on one rank, predicted."""

from __future__ import annotations

from strategies.base import Collective, Footprint, ModelSpec, Plan, WorldSpec

_NUMBER = 4
"""Bytes: masters, gradients and moments are fp32."""


def zero_footprint(
    model: ModelSpec,
    world: WorldSpec,
    plan: Plan,
    *,
    stage: int,
    bucket_bytes: int,
    gathered_bytes: int,
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
        bucket_bytes: in which gradients are reduced.
        gathered_bytes: of weights that are gathered ahead, in stage 3.
        offloaded: masters and moments are in host memory.
        optimizer_on_nvme: they are on NVMe.
        weights_on_nvme: weights too.
    """
    ranks, trained, whole = world.size, model.num_trainable * _NUMBER, model.num_parameters * _NUMBER
    masters, moments = trained // ranks, int(trained * model.slots_per_parameter) // ranks
    collectives = []
    if ranks > 1:
        gathers = 2 * plan.accumulation if stage == 3 else 1
        kind, reductions = ("all_reduce", 1) if stage == 1 else ("reduce_scatter", plan.accumulation)
        collectives = [
            Collective(kind=kind, payload_bytes=trained, count=reductions, ranks=ranks),
            Collective(kind="all_gather", payload_bytes=whole if stage == 3 else trained, count=gathers, ranks=ranks),
        ]
    return Footprint(
        weights_bytes=(whole // ranks if stage == 3 else whole) + masters,
        gradients_bytes=trained if stage == 1 else trained // ranks,
        moments_bytes=moments,
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=2 * min(trained, bucket_bytes) + (min(whole, gathered_bytes) if stage == 3 else 0),
        collectives=tuple(collectives),
        host_bytes=masters + moments if offloaded else 0,
        nvme_bytes=(masters + moments if optimizer_on_nvme else 0) + (whole // ranks if weights_on_nvme else 0),
    )
