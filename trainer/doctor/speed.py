"""How fast each rank's device computes: one that is slower than the others holds up all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from strategies.precision import Numbers
from strategies.world import World
from trainer.doctor.collectives import finish
from trainer.doctor.findings import Finding, Level, listed
from trainer.doctor.hosts import Layout
from trainer.doctor.verdicts import upper_median
from trainer.metrics.throughput import peak_flops

_WIDTH = {"cuda": 8192, "cpu": 384}


def measure_speed(world: World, seconds: float) -> float:
    """This rank's FLOP/s in matrix products, all ranks at once: the best turn, so that a hiccup doesn't count."""
    on_gpu = world.device.type == "cuda"
    width, dtype = _WIDTH["cuda" if on_gpu else "cpu"], torch.bfloat16 if on_gpu else torch.float32
    a = torch.ones(width, width, device=world.device, dtype=dtype)
    out = torch.empty_like(a)
    best, turns = float("inf"), 8 if on_gpu else 1
    world.barrier()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        finish(world)
        begun = time.perf_counter()
        for _ in range(turns):
            torch.mm(a, a, out=out)
        finish(world)
        best = min(best, (time.perf_counter() - begun) / turns)
    return 2 * width**3 / best


def judge_speed(flops: Sequence[float], layout: Layout, device: torch.device) -> list[Finding]:
    """Ranks that compute much slower than the others, by name."""
    usual = upper_median(flops)
    peak = peak_flops(device, Numbers.bf16)
    grave, slow = 0.5 * usual, (0.8 if device.type == "cuda" else 0.5) * usual
    lame = {rank: each for rank, each in enumerate(flops) if each < slow}
    said = f"{usual / 1e12:,.2f} TFLOP/s" + ("" if peak is None else f", {usual / peak:.0%} of the device's peak")
    if not lame:
        return [Finding(check="compute", level=Level.ok, what=f"each rank about {said}")]
    # On processors, what else runs there decides; a GPU is a rank's own.
    failed = device.type == "cuda" and min(lame.values()) < grave
    return [
        Finding(
            check="compute",
            level=Level.failure if failed else Level.warning,
            what=listed(
                [f"{layout.name_of(rank)} is slow: {each / usual:.0%} of the usual" for rank, each in lame.items()]
            )
            + f" {said}",
            where=tuple(f"rank {rank}" for rank in lame),
            advice="See what else runs there, and whether it is slowed down by heat; then replace the host",
        )
    ]
