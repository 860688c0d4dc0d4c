"""All-reduce, all-gather, reduce-scatter and point-to-point by size, in the bus bandwidth of NCCL's tests.

Bus bandwidth is what one rank's link carries, so that it can be held against hardware for any number of ranks n: bytes
per second times 2 (n - 1) / n for all-reduce, (n - 1) / n for all-gather and reduce-scatter (whose size is that of the
whole, as in nccl-tests), and 1 where each rank sends to the next one.

Source: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from strategies.world import World
from trainer.doctor.findings import Finding, Level
from trainer.instances import Instance

SIZES = (2**10, 2**15, 2**20, 2**24, 2**27, 2**30)
QUICK_SIZES = (2**10, 2**20, 2**24)
_MOST_TURNS = 20
# torch 2.13 has given both other names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, kw_only=True)
class _Operation:
    name: str
    factor: Callable[[int], float]
    prepare: Callable[[World, int], Callable[[], object]]


def measure_collectives(
    world: World, sizes: Sequence[int], budget_s: float, say: Callable[[str], None]
) -> dict[str, list[dict[str, float]]]:
    """By operation, a row for each size; equal on every rank.

    Args:
        world: the ranks; at least two.
        sizes: bytes, growing.
        budget_s: for one size of one operation; sizes that would take longer are left out.
        say: what is being done.
    """
    most = _most_bytes(world)
    found: dict[str, list[dict[str, float]]] = {}
    for operation in OPERATIONS:
        say(f"measuring {operation.name.replace('_', '-')}")
        rows = found[operation.name] = []
        for size in sizes:
            if size > most or 3 * _predicted_s(rows, size) > budget_s:
                break  # the numbers are the same on every rank, and so is this
            took = _seconds(world, operation.prepare(world, size), budget_s)
            rate = operation.factor(world.size) * size / took
            rows.append({"bytes": size, "ms": 1e3 * took, "bus_gb_per_s": rate / 1e9})
    return found


def _predicted_s(rows: Sequence[Mapping[str, float]], size: int) -> float:
    """From two sizes: what doesn't grow with the size is left as it is."""
    if len(rows) < 2:
        return 0.0
    before, last = rows[-2:]
    per_byte = max(0.0, last["ms"] - before["ms"]) / (last["bytes"] - before["bytes"])
    return (last["ms"] + per_byte * (size - last["bytes"])) / 1e3


def _most_bytes(world: World) -> int:
    """What fits on every rank, with a few buffers of that size."""
    import psutil

    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = psutil.virtual_memory().available // world.local_size
    return int(world.reduce([free / 16], "min")[0])


def _seconds(world: World, run: Callable[[], object], budget_s: float) -> float:
    """Of one, on the slowest rank: a first one to warm up and to see how many fit, then those in a row."""
    first = _timed(world, run, 1)
    if first > budget_s:
        return first
    turns = max(2, min(_MOST_TURNS, int(budget_s / 2 / max(first, 1e-6))))
    return _timed(world, run, turns)


def _timed(world: World, run: Callable[[], object], turns: int) -> float:
    world.barrier()
    begun = time.perf_counter()
    for _ in range(turns):
        run()
    finish(world)
    return world.reduce([(time.perf_counter() - begun) / turns], "max")[0]


def finish(world: World) -> None:
    """Wait for this rank's device."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _floats(world: World, size: int) -> torch.Tensor:
    return torch.ones(max(1, size // 4), device=world.device)


def _all_reduce(world: World, size: int) -> Callable[[], object]:
    tensor = torch.zeros(max(1, size // 4), device=world.device)
    return lambda: dist.all_reduce(tensor)


def _all_gather(world: World, size: int) -> Callable[[], object]:
    part = _floats(world, size // world.size)
    whole = part.new_empty(part.numel() * world.size)
    return lambda: _ALL_GATHER(whole, part)


def _reduce_scatter(world: World, size: int) -> Callable[[], object]:
    part = _floats(world, size // world.size)
    whole = part.new_ones(part.numel() * world.size)
    return lambda: _REDUCE_SCATTER(part, whole)


def _send_on(world: World, size: int) -> Callable[[], object]:
    out, into = _floats(world, size), _floats(world, size)
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def run() -> None:
        both = [dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return run


OPERATIONS = (
    _Operation(name="all_reduce", factor=lambda n: 2 * (n - 1) / n, prepare=_all_reduce),
    _Operation(name="all_gather", factor=lambda n: (n - 1) / n, prepare=_all_gather),
    _Operation(name="reduce_scatter", factor=lambda n: (n - 1) / n, prepare=_reduce_scatter),
    _Operation(name="point_to_point", factor=lambda n: 1.0, prepare=_send_on),
)


def expected_gb_per_s(instance: Instance | None, hosts: int) -> float | None:
    """What hardware allows one rank's collectives at most: NVLink inside a host, the host's network between hosts."""
    if instance is None:
        return None
    inside = None if instance.nvlink_gb_per_s is None else instance.nvlink_gb_per_s / 2
    if hosts == 1:
        return inside
    between = None if instance.network_gbps is None else instance.network_gbps / 8
    return between if inside is None or between is None else min(inside, between)


def judge_collectives(
    found: dict[str, list[dict[str, Any]]], limit_gb_per_s: float | None, instance: Instance | None
) -> list[Finding]:
    """The best rate of each operation against what the hardware allows; where that is known."""
    findings = []
    for name, rows in found.items():
        best = max(rows, key=lambda row: float(row["bus_gb_per_s"]), default=None)
        if best is None:
            continue
        rate = float(best["bus_gb_per_s"])
        what = f"{rate:,.3g} GB/s"
        level, advice = Level.ok, ""
        if limit_gb_per_s is not None and instance is not None and name != "point_to_point":
            what += f" of the {limit_gb_per_s:,.0f} GB/s that {instance.type} has"
            if rate < 0.5 * limit_gb_per_s:
                level = Level.warning if rate >= 0.2 * limit_gb_per_s else Level.failure
                advice = "See the findings on NCCL's network, EFA and the slowest hosts"
        findings.append(Finding(check=name.replace("_", "-"), level=level, what=what, advice=advice))
    return findings
