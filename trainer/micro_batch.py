"""Find the largest micro-batch that fits, without ever running out of memory on one rank alone.

The size grows from one sample up, and the bytes of the next size are extrapolated before it is tried, so that
in the ordinary case no rank meets the limit. Where one does, all ranks hear of it and take the size before.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError
from strategies.world import World
from trainer.shortage import is_shortage, let_go

_PATIENCE_S = 20.0
"""How long a rank that ran out of memory waits for the others' attempt, besides ten times its own."""
SAFE = 0.85
"""Share of the memory that may be planned for; the rest is for fragmentation and what grows later."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [value for value in range(1, number + 1) if number % value == 0]


def find_micro_batch(world: World, share: int, attempt: Callable[[int], None], reserve_bytes: int) -> int:
    """The largest divisor of `share` with which `attempt` stays within this machine's memory. Collective.

    Args:
        world: all ranks agree on the smallest of what each finds.
        share: samples of one optimizer step on one rank.
        attempt: forward and backward of that many samples.
        reserve_bytes: what a step needs besides, such as moments that aren't there yet.

    Raises:
        ConfigError: not even one sample fits; on every rank.
        TrainingError: this rank ran out of memory in an attempt in which the others wait for it.
    """
    limit = SAFE * _limit_bytes(world) - reserve_bytes
    seen = [(0, _used_bytes(world))]
    for size in divisors(share):
        best, used = seen[-1]
        fits = True
        if len(seen) > 1:
            growth = (used - seen[-2][1]) / (best - seen[-2][0])
            fits = used + growth * (size - best) <= limit
        if world.reduce([float(fits)], "min")[0] < 1:  # all or none: an attempt may need the other ranks
            break
        fits = _attempted(world, size, best, attempt) and _used_bytes(world) <= limit
        if world.reduce([float(fits)], "min")[0] < 1:
            break
        seen.append((size, _used_bytes(world)))
    if seen[-1][0] == 0:
        raise ConfigError(
            "Trainer: not even one sample fits into memory. Use a smaller model or shorter samples (model, "
            "data.length), trainer.activation_checkpointing=full, or a strategy that shards (strategy)."
        )
    return seen[-1][0]


def _attempted(world: World, size: int, best: int, attempt: Callable[[int], None]) -> bool:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    begin = time.monotonic()
    try:
        attempt(size)
    except Exception as error:
        if not is_shortage(error):
            raise
        let_go(error)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        _wait_for_others(world, size, best, _PATIENCE_S + 10 * (time.monotonic() - begin))
        return False
    _wait_for_others(world, size, best, None)
    return True


def _wait_for_others(world: World, size: int, best: int, patience_s: float | None) -> None:
    """Until all have tried. Where weights are sharded, they may be waiting for a part that this rank can't give."""
    if world.size == 1:
        return
    try:
        dist.monitored_barrier(world.control, timeout=None if patience_s is None else timedelta(seconds=patience_s))
    except RuntimeError as error:
        if patience_s is None:
            raise
        fix = f"Use trainer.micro_batch={best}" if best else "Use a smaller model, or shorter samples (model)"
        raise TrainingError(
            f"Trainer: rank {world.rank} ran out of memory while it tried a micro-batch of {size}, and the others wait "
            f"for it. {fix} (trainer.micro_batch)."
        ) from error


def _limit_bytes(world: World) -> float:
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    free = psutil.virtual_memory().available
    return float(psutil.Process().memory_info().rss + free / world.local_size)


def _used_bytes(world: World) -> float:
    """The peak so far."""
    if world.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(world.device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
