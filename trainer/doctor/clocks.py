"""How far the hosts' clocks are apart, from round trips between rank 0 and one rank of each other host."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from strategies.world import World
from trainer.doctor.findings import Finding, Level, listed
from trainer.doctor.hosts import Layout

_TURNS = 8
_WORTH_KNOWING_S = 0.5
_REFUSED_S = 300.0
"""AWS refuses requests that are signed by a clock so far off."""


def measure_clocks(world: World, layout: Layout) -> list[list[float]] | None:
    """Each host's clock against that of rank 0's host: seconds ahead, and how far that may be off; on rank 0."""
    found = [[0.0, 0.0]]
    for leader in layout.leaders[1:]:
        if world.rank == 0:
            found.append(list(offset([_ask(world, leader) for _ in range(_TURNS)])))
        elif world.rank == leader:
            for _ in range(_TURNS):
                _answer(world)
    return found if world.rank == 0 else None


def offset(asked: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """From round trips: the clock there minus the clock here, and how wrong that can be.

    Args:
        asked: of each round trip, the clock here before and after, and the clock there in between.

    The quickest round trip counts: whatever its two ways took, the clock there was read in between.
    """
    sent, back, there = min(asked, key=lambda each: each[1] - each[0])
    return there - (sent + back) / 2, (back - sent) / 2


def _ask(world: World, leader: int) -> tuple[float, float, float]:
    there = torch.zeros(1, dtype=torch.float64)
    sent = time.time()
    dist.send(there, leader, group=world.control)
    dist.recv(there, leader, group=world.control)
    return sent, time.time(), float(there)


def _answer(world: World) -> None:
    clock = torch.zeros(1, dtype=torch.float64)
    dist.recv(clock, 0, group=world.control)
    clock[0] = time.time()
    dist.send(clock, 0, group=world.control)


def judge_clocks(found: Sequence[Sequence[float]], names: Sequence[str]) -> list[Finding]:
    """What is to be thought of them."""
    if len(found) < 2:
        return []
    middle, middle_unsure = sorted((ahead, unsure) for ahead, unsure in found)[len(found) // 2]
    off = {
        name: ahead - middle
        for name, (ahead, unsure) in zip(names, found, strict=True)
        if abs(ahead - middle) - unsure - middle_unsure > _WORTH_KNOWING_S
    }
    if not off:
        spread = max(ahead for ahead, _ in found) - min(ahead for ahead, _ in found)
        unsure = max(unsure for _, unsure in found)
        return [Finding(check="clocks", level=Level.ok, what=f"within {1e3 * spread:.1f} ms (±{1e3 * unsure:.1f} ms)")]
    grave = max(abs(seconds) for seconds in off.values()) > _REFUSED_S
    return [
        Finding(
            check="clocks",
            level=Level.failure if grave else Level.warning,
            what=listed([f"{name} is {abs(s):,.1f} s {'ahead' if s > 0 else 'behind'}" for name, s in off.items()]),
            where=tuple(off),
            advice="Let chrony or systemd-timesyncd set it" + (": AWS refuses what it signs" if grave else ""),
        )
    ]
