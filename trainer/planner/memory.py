"""The most that a rank holds at once, by kind: what stays, what a strategy gathers, and the activations beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from strategies.base import Footprint
from trainer.planner.stages import Trace

FRAGMENTATION = 0.03
"""Share of what comes and goes in a step that lies between blocks in use, and can't be had."""
CACHED = 0.14
"""Of what is in use at most, so much more does torch's allocator hold where there is room, and gives back where there
isn't. Published pairs of peak use and peak reservation are far apart: +36 % and +20 % (FSDP2, full and selective
checkpointing: github.com/pytorch/torchtitan pull request 165), about 0 (one device: github.com/meta-pytorch/torchtune
pull request 961); this is the mean of the two sources. It is what a tool shows as memory; whether a job fits doesn't
hang on it.
"""


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
    """What the allocator holds besides: fragments, and blocks for later."""
    host: int
    """In host memory instead."""
    nvme: int

    @property
    def total(self) -> int:
        """On the device."""
        kept = self.weights + self.gradients + self.moments
        return kept + self.gathered + self.activations + self.logits + self.margin

    @property
    def in_use(self) -> int:
        """On the device, without the margin."""
        return self.total - self.margin

    @property
    def everywhere(self) -> int:
        """On the device, in host memory and on NVMe; without the margin."""
        return self.in_use + self.host + self.nvme

    def parts(self) -> dict[str, int]:
        """Those on the device, in the order in which they are drawn."""
        names = ("weights", "gradients", "moments", "gathered", "activations", "logits", "margin")
        return {name: getattr(self, name) for name in names}


def memory(footprint: Footprint, trace: Trace | None, limit: int | None = None) -> Memory:
    """What a step takes at its highest moment.

    Args:
        footprint: of the strategy.
        trace: of one micro-batch; None: without activations.
        limit: bytes that the device has; None: not known.
    """
    weights, gradients, moments = footprint.weights_bytes, footprint.gradients_bytes, footprint.moments_bytes
    elsewhere = footprint.host_bytes + footprint.nvme_bytes
    moments_off = min(moments, elsewhere)
    weights_off = min(weights, elsewhere - moments_off)
    gradients -= min(gradients, elsewhere - moments_off - weights_off)
    highest = _Moment(gradients, footprint.buffers_bytes)
    if trace is not None:
        in_step = _Moment(gradients, footprint.step_bytes)
        highest = max(_highest(footprint, trace, gradients), in_step, key=lambda moment: moment.total)
    moving = highest.gathered + highest.activations
    kept = weights + moments - weights_off - moments_off + highest.gradients
    return Memory(
        weights=weights - weights_off,
        gradients=highest.gradients,
        moments=moments - moments_off,
        gathered=highest.gathered,
        activations=highest.activations - highest.logits,
        logits=highest.logits,
        margin=_margin(kept, moving, limit),
        host=footprint.host_bytes,
        nvme=footprint.nvme_bytes,
    )


@dataclass(frozen=True)
class _Moment:
    """What comes and goes in a step, at one moment of it."""

    gradients: int
    gathered: int
    activations: int = 0
    logits: int = 0
    """Of activations."""

    @property
    def total(self) -> int:
        return self.gradients + self.gathered + self.activations


def _highest(footprint: Footprint, trace: Trace, gradients: int) -> _Moment:
    """Of forward and backward; `gradients`: bytes on the device, once all are there."""
    number, activations, come, fresh = trace.moments
    num_stages = len(trace.forward) + len(trace.backward)
    beside = footprint.beside or (footprint.buffers_bytes,)
    if len(beside) != num_stages:  # cut at other places than where it was traced
        beside = (max(beside),) * num_stages
    gathered = np.array(beside, dtype=np.int64)[number]
    there = np.full_like(come, gradients)
    if footprint.gradients_come and trace.gradients:
        reduced = come if footprint.gradients_whole_first else come + fresh
        there = (reduced * (gradients / trace.gradients)).astype(np.int64)
    if footprint.gradients_whole_first:
        gathered = gathered + fresh
    at = int(np.argmax(activations + there + gathered))
    is_head = number[at] in (len(trace.forward) - 1, len(trace.forward))
    most = int(activations[at])
    logits = max(0, most - trace.forward[-1].before) if is_head else 0
    return _Moment(int(there[at]), int(gathered[at]), most, logits)


def _margin(kept: int, moving: int, limit: int | None) -> int:
    least, most = int(FRAGMENTATION * moving), int(CACHED * (kept + moving))
    room = most if limit is None else limit - kept - moving
    return max(least, min(most, room))
