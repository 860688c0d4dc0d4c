"""Seconds of a step on some machines: what computes, what travels, and how much of that hides behind computing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from strategies.base import Collective, Footprint, Plan
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.kernels import Call, Kind
from trainer.planner.stages import Stage, Trace

_PASSES = {"all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0, "all_reduce": 2.0}
"""How often each byte of a payload goes round the ring, times (ranks - 1) / ranks."""
_LARGE = 1 << 25
"""Bytes from which a ring is what NCCL takes between nodes: the smallest of the all-gathers that factors come from."""
_NEAR_STEP_S, _FAR_STEP_S = 3.4e-6, 14e-6
"""From one rank of a ring to the next, over NVLink and over a network other than EFA, which was measured
(`inter_step_s`). Source: NCCL's own model (src/graph/tuning.cc: hwLat, ring, Simple)."""
_CLIP_PASSES = 3
"""Gradients are read for the norm, and scaled: read and written."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One optimizer step, in seconds on each rank."""

    compute_s: float
    """Forward and backward of all micro-batches, with what is computed again, beside the collectives that they hide."""
    optimizer_s: float
    communication_s: float
    """All collectives, one after the other."""
    exposed_s: float
    """Of these, what hides behind no compute."""
    by_collective: Mapping[str, float]
    """`kind, over what` -> seconds."""
    tokens: int
    """Of all ranks, in a step."""
    flops: float
    """Of one rank: matrix products and attention, with what is computed again."""
    model_flops: float
    """The same without what is computed again."""
    peak_flops: float
    """Of one device, in a second."""

    @property
    def step_s(self) -> float:
        """All together."""
        return self.compute_s + self.optimizer_s + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step_s

    @property
    def flops_per_s(self) -> float:
        """Of one rank, with what is computed again."""
        return self.flops / self.step_s

    @property
    def utilisation(self) -> float:
        """MFU: the model's own FLOPs by the device's peak, 0 to 1."""
        return self.model_flops / self.step_s / self.peak_flops


@dataclass(frozen=True, kw_only=True)
class Compute:
    """One micro-batch on one device, alone."""

    forward_s: float
    backward_s: float
    flops: float
    """With what is computed again."""
    num_tokens: int


def compute(trace: Trace, machines: Machines, factors: Efficiency, *, compiled: bool = False) -> Compute | None:
    """What a micro-batch takes on one of the devices; None: the rate of its memory isn't known.

    Args:
        trace: of one micro-batch.
        machines: what it runs on.
        factors: how much of their rates is reached.
        compiled: its blocks, by torch.compile.
    """
    if machines.memory_bytes_per_s is None:
        return None
    return Compute(
        forward_s=_seconds(trace.forward, machines, factors, compiled) / factors.in_step,
        backward_s=_seconds(trace.backward, machines, factors, compiled) / factors.in_step,
        flops=trace.flops,
        num_tokens=trace.num_tokens,
    )


def speed(
    micro_batch: Compute,
    footprint: Footprint,
    plan: Plan,
    machines: Machines,
    factors: Efficiency,
    *,
    model_flops: float,
) -> Speed | None:
    """What a step takes; None: a rate isn't known that it hangs on.

    Args:
        micro_batch: on one device.
        footprint: of the strategy, with its collectives.
        plan: how many micro-batches there are.
        machines: what it runs on; all their devices take part.
        factors: how much of their rates is reached.
        model_flops: of one micro-batch, without what is computed again.
    """
    computing = {
        "forward": plan.accumulation * micro_batch.forward_s,
        "backward": plan.accumulation * micro_batch.backward_s,
        "step": 0.0,
    }
    exposed = total = hidden = 0.0
    by_collective: dict[str, float] = {}
    for name, compute_s in computing.items():
        mine = [each for each in footprint.collectives if each.phase == name]
        seconds = list[float]()
        for each in mine:
            spent = collective_s(each, machines, factors)
            if spent is None:
                return None
            seconds.append(spent)
            where = f"{each.kind}, {'between nodes' if crosses(each, machines) else 'within a node'}"
            by_collective[where] = by_collective.get(where, 0.0) + spent
        taken = sum(seconds)
        # The first gathering has nothing to hide behind, and neither has the last reduction.
        alone = max((spent / each.count for spent, each in zip(seconds, mine, strict=True)), default=0.0)
        seen = max(taken - compute_s, min(taken, alone))
        exposed, total, hidden = exposed + seen, total + taken, hidden + taken - seen
    optimizer_s = _optimizer_s(footprint, plan, machines, factors)
    if optimizer_s is None:
        return None
    assert machines.memory_bytes_per_s is not None
    copied_s = footprint.copied_bytes / (machines.memory_bytes_per_s * factors.memory)
    return Speed(
        compute_s=computing["forward"] + computing["backward"] + copied_s + hidden * (factors.overlap - 1),
        optimizer_s=optimizer_s,
        communication_s=total,
        exposed_s=exposed,
        by_collective=by_collective,
        tokens=micro_batch.num_tokens * plan.accumulation * machines.size,
        flops=micro_batch.flops * plan.accumulation,
        model_flops=model_flops * plan.accumulation,
        peak_flops=machines.peak_flops,
    )


def _seconds(stages: Iterable[Stage], machines: Machines, factors: Efficiency, compiled: bool) -> float:
    known: dict[int, float] = {}  # stages that are alike share their calls
    total = 0.0
    for number, stage in enumerate(stages):
        key = id(stage.calls)
        if key not in known:
            known[key] = seconds_of(stage.calls, machines, factors, compiled and number % 2 == 1)  # blocks are
        total += known[key]
    return total


def seconds_of(calls: Iterable[Call], machines: Machines, factors: Efficiency, compiled: bool) -> float:
    """Operators that run one after the other on one device.

    Each takes what its products or its bytes take, whichever is more; all of them no less than it takes to start
    them one by one.
    """
    assert machines.memory_bytes_per_s is not None
    rates = {
        Kind.matmul: machines.peak_flops * factors.matmul,
        Kind.attention_forward: machines.peak_flops * factors.attention_forward,
        Kind.attention_backward: machines.peak_flops * factors.attention_backward,
    }
    moved_per_s = machines.memory_bytes_per_s * factors.memory
    fusion = factors.fusion if compiled else 1.0
    busy, launched = 0.0, 0
    for call in calls:
        if call.kind is Kind.memory:
            busy += call.bytes * fusion / moved_per_s
        else:
            busy += max(call.flops / rates[call.kind], call.bytes / moved_per_s)
        launched += 1
    return busy if compiled else max(busy, launched * factors.launch_s)


def crosses(collective: Collective, machines: Machines) -> bool:
    """Whether a group of it lies on several nodes."""
    return collective.ranks * collective.stride > machines.devices and machines.nodes > 1


def collective_s(collective: Collective, machines: Machines, factors: Efficiency) -> float | None:
    """Seconds of all its calls; None: the links' rate isn't known."""
    around = _PASSES[collective.kind] * (collective.ranks - 1) / collective.ranks * collective.payload_bytes
    if not crosses(collective, machines):
        if machines.link_bytes_per_s is None:
            return None
        reached = factors.intra_all_reduce if collective.kind == "all_reduce" else factors.intra_collective
        return collective.count * (around / (machines.link_bytes_per_s * reached) + factors.intra_latency_s)
    if machines.network_bytes_per_s is None:
        return None
    # So many groups share a node's network: as many as there are ranks of the node in different ones.
    sharing = min(collective.stride, machines.devices)
    rate = machines.network_bytes_per_s * factors.inter_collective / sharing
    slowest = around / rate
    if machines.link_bytes_per_s is not None and collective.stride < machines.devices:
        slowest = max(slowest, around / (machines.link_bytes_per_s * factors.intra_collective))
    waiting = factors.inter_latency_s
    if collective.payload_bytes >= _LARGE:
        waiting = max(waiting, _around_s(collective, machines, factors))
    return collective.count * (slowest + waiting)


def _around_s(collective: Collective, machines: Machines, factors: Efficiency) -> float:
    """Seconds of a step from rank to rank through the whole ring, whatever travels."""
    if machines.efa:
        return factors.inter_step_s * (collective.ranks - 1)
    far = math.ceil(collective.ranks * collective.stride / machines.devices)
    return far * _FAR_STEP_S + max(0, collective.ranks - 1 - far) * _NEAR_STEP_S


def _optimizer_s(footprint: Footprint, plan: Plan, machines: Machines, factors: Efficiency) -> float | None:
    """Clipping and the update pass over what a rank keeps, which on the host passes its link; None: not known."""
    assert machines.memory_bytes_per_s is not None
    if footprint.nvme_bytes:
        return None  # no table says how fast a node's disks are
    clipped = _CLIP_PASSES if plan.clip_norm is not None else 1
    gradients = footprint.stepped_bytes or footprint.gradients_bytes
    updated = 2 * footprint.moments_bytes + 3 * gradients  # weights are as many as gradients
    passed = updated + clipped * gradients
    seconds = passed / (machines.memory_bytes_per_s * factors.memory)
    if footprint.host_bytes:
        if machines.host_link_bytes_per_s is None:
            return None
        seconds += 2 * gradients / machines.host_link_bytes_per_s  # gradients there, weights back
    return seconds
