"""The most that a rank holds at once, by kind: what stays, what a strategy gathers, and the activations beside it."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Footprint
from trainer.planner.trace import Trace

FRAGMENTATION = 0.03
"""Share of what comes and goes in a step that lies between blocks in use."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank on its device at the highest moment of a step."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    """Weights and gradients of parts that are whole for a moment, and a strategy's buffers."""
    activations: int
    logits: int
    """Of activations, those of the head and the loss."""
    margin: int
    """For fragmentation."""
    host: int
    """In host memory instead."""
    nvme: int

    @property
    def total(self) -> int:
        """On the device."""
        kept = self.weights + self.gradients + self.moments
        return kept + self.gathered + self.activations + self.logits + self.margin

    def parts(self) -> dict[str, int]:
        """Those on the device, in the order in which they are drawn."""
        names = ("weights", "gradients", "moments", "gathered", "activations", "logits", "margin")
        return {name: getattr(self, name) for name in names}


def memory(footprint: Footprint, trace: Trace | None) -> Memory:
    """What a step takes at its highest moment.

    Args:
        footprint: of the strategy.
        trace: of one micro-batch; None: without activations.
    """
    gathered, activations, logits = footprint.buffers_bytes, 0, 0
    if trace is not None:
        gathered, activations, logits = _highest(footprint, trace)
    weights, gradients, moments = footprint.weights_bytes, footprint.gradients_bytes, footprint.moments_bytes
    elsewhere = footprint.host_bytes + footprint.nvme_bytes
    moments_off = min(moments, elsewhere)
    weights_off = min(weights, elsewhere - moments_off)
    gradients_off = min(gradients, elsewhere - moments_off - weights_off)
    return Memory(
        weights=weights - weights_off,
        gradients=gradients - gradients_off,
        moments=moments - moments_off,
        gathered=gathered,
        activations=activations,
        logits=logits,
        margin=int(FRAGMENTATION * (gathered + activations + logits)),
        host=footprint.host_bytes,
        nvme=footprint.nvme_bytes,
    )


def _highest(footprint: Footprint, trace: Trace) -> tuple[int, int, int]:
    """What is gathered, activations, and logits among them, at the stage where they are most together."""
    stages = [*trace.forward, *reversed(trace.backward)]
    beside = footprint.beside if len(footprint.beside) == len(stages) else [footprint.buffers_bytes] * len(stages)
    at = max(range(len(stages)), key=lambda index: beside[index] + stages[index].peak)
    before_head = trace.forward[-1].before
    peak = stages[at].peak
    is_head = at in (len(trace.forward) - 1, len(trace.forward))
    logits = max(0, peak - before_head) if is_head else 0
    return beside[at], peak - logits, logits
