"""Find the largest micro-batch that fits, without ever running out of memory on one rank alone.

The size grows from one sample up, and the bytes of the next size are extrapolated before it is tried, so that
in the ordinary case no rank meets the limit. Where one does, all ranks hear of it and take the size before.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import psutil
import torch

from strategies.errors import ConfigError
from strategies.world import World

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
        attempt: forward and backward of that many samples, without talking to other ranks.
        reserve_bytes: what a step needs besides, such as moments that aren't there yet.

    Raises:
        ConfigError: not even one sample fits; on every rank.
    """
    limit = SAFE * _limit_bytes(world) - reserve_bytes
    seen = [(0, _used_bytes(world))]
    for size in divisors(share):
        best, used = seen[-1]
        fits = True
        if len(seen) > 1:
            growth = (used - seen[-2][1]) / (best - seen[-2][0])
            fits = used + growth * (size - best) <= limit
        if fits:
            fits = _attempted(world, size, attempt) and _used_bytes(world) <= limit
        if world.reduce([float(fits)], "min")[0] < 1:
            break
        seen.append((size, _used_bytes(world)))
    if seen[-1][0] == 0:
        raise ConfigError(
            "Trainer: not even one sample fits into memory. Use a smaller model or shorter samples (model, "
            "data.length), trainer.activation_checkpointing=full, or a strategy that shards (strategy)."
        )
    return seen[-1][0]


def _attempted(world: World, size: int, attempt: Callable[[int], None]) -> bool:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch's CPU allocator says it
            raise
        return False
    return True


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
