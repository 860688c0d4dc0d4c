"""All that is measured between the ranks of a job, in one order on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from strategies.world import World
from trainer.doctor.clocks import judge_clocks, measure_clocks
from trainer.doctor.collectives import (
    QUICK_SIZES,
    SIZES,
    expected_gb_per_s,
    judge_collectives,
    measure_collectives,
)
from trainer.doctor.efa import counters, devices, differences, judge_counters
from trainer.doctor.findings import Finding, Level, plural
from trainer.doctor.guard import Guard
from trainer.doctor.hosts import Layout
from trainer.doctor.pairs import (
    Links,
    between_hosts,
    inside_hosts,
    measure_links,
    slow_hosts_again,
    slow_ranks_again,
)
from trainer.doctor.speed import judge_speed, measure_speed
from trainer.doctor.verdicts import find_slow, judge_expected, judge_links
from trainer.instances import Instance

_CPU_MOST = 2**27


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long the measurements may take."""

    sizes: tuple[int, ...] = SIZES
    collective_s: float = 2.0
    """For one size of one collective."""
    compute_s: float = 0.5
    way_s: float = 0.3
    """For each way of a pair."""
    pairs_s: float = 120.0
    """For all pairs inside of hosts, and again for those between them."""
    most_rounds: int | None = None
    limit_s: float = 300.0
    """For each part, before this rank gives up waiting for the others."""


FULL = Pace()
QUICK = Pace(sizes=QUICK_SIZES, collective_s=0.4, compute_s=0.1, way_s=0.2, pairs_s=3.0, most_rounds=3, limit_s=60.0)


@dataclass(kw_only=True)
class Measured:
    """What came out."""

    clocks: list[list[float]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    collectives: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    inside: Links = field(default_factory=Links)
    between: Links = field(default_factory=Links)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)
    """By host: what its network cards have counted meanwhile."""
    efa_hosts: int = 0

    def as_json(self, layout: Layout) -> dict[str, Any]:
        """For `doctor.json`."""
        late = self.between.hosts_us(layout)
        names = layout.names
        return {
            **self.collectives,
            "clocks_ahead_s": {name: each[0] for name, each in zip(names, self.clocks, strict=False)},
            "flops_by_rank": self.flops,
            "between_hosts": [
                {"from": names[a], "to": names[b], "gb_per_s": rate, "latency_us": late[a, b]}
                for (a, b), rate in sorted(self.between.hosts_gb_per_s.items())
            ],
            "between_ranks": [
                {"from": a, "to": b, "gb_per_s": rate, "latency_us": links.us[a, b]}
                for links in (self.inside, self.between)
                for (a, b), rate in sorted(links.gb_per_s.items())
            ],
            "counters": self.counted,
        }


def measure(world: World, layout: Layout, pace: Pace, guard: Guard, say: Callable[[str], None]) -> Measured:
    """Collective; whole on rank 0."""
    found = Measured()
    mine = layout.names[layout.host_of[world.rank]]
    leads = world.rank in layout.leaders
    sizes = tuple(size for size in pace.sizes if world.device.type == "cuda" or size <= _CPU_MOST)
    before = counters() if leads else {}

    @contextlib.contextmanager
    def part(name: str) -> Iterator[Callable[[str], None]]:
        say(name)
        with guard.step(name, pace.limit_s):
            yield lambda what: say(f"{name}: {what}")

    with part("comparing clocks"):
        found.clocks = measure_clocks(world, layout) or []
    with part("measuring how fast each rank computes"):
        found.flops = world.collect(measure_speed(world, pace.compute_s)) or []
    if world.size > 1:
        with part("measuring collectives") as tell:
            found.collectives = measure_collectives(world, sizes, pace.collective_s, tell)
        with part("measuring pairs of ranks inside of hosts") as tell:
            plan = inside_hosts(layout)[: pace.most_rounds]
            found.inside = measure_links(
                world, layout, plan, slow_ranks_again, seconds=pace.way_s, budget_s=pace.pairs_s, say=tell
            )
        with part("measuring pairs of hosts") as tell:
            plan = between_hosts(layout)[: pace.most_rounds]
            found.between = measure_links(
                world, layout, plan, slow_hosts_again(layout), seconds=pace.way_s, budget_s=pace.pairs_s, say=tell
            )
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # it is a run's now
    with part("reading counters"):
        counted = world.collect([mine, differences(before, counters()), len(devices())] if leads else None)
    told = [each for each in counted or [] if each is not None]
    found.counted = {name: counts for name, counts, _ in told}
    found.efa_hosts = sum(efa > 0 for _, _, efa in told)
    return found


def _hosts(layout: Layout, pair: tuple[int, int]) -> list[int]:
    return [layout.host_of[rank] for rank in pair]


def judge_measured(found: Measured, layout: Layout, world: World, instance: Instance | None) -> list[Finding]:
    """What is to be thought of it."""
    on_gpu, hosts = world.device.type == "cuda", len(layout.names)
    findings = [*judge_clocks(found.clocks, layout.names), *judge_speed(found.flops, layout, world.device)]
    whole = (
        on_gpu and instance is not None and all(len(layout.ranks_on(host)) == instance.gpus for host in range(hosts))
    )  # of a part of a host's GPUs, nothing is known
    limit = expected_gb_per_s(instance, hosts) if whole else None
    findings += judge_collectives(found.collectives, limit, instance)
    ranks = [layout.name_of(rank) for rank in range(len(layout.host_of))]
    findings += judge_links(
        "ranks of a host", found.inside.gb_per_s, found.inside.us, ranks, bits=False, only_warn=not on_gpu
    )
    rates, late = found.between.hosts_gb_per_s, found.between.hosts_us(layout)
    findings += judge_links("between hosts", rates, late, layout.names, bits=True, only_warn=False)
    if on_gpu and len(ranks) > hosts:
        # Of GPUs, each has a network card to itself or shares it with few; a slow host is named already.
        named = find_slow(rates) if rates else None
        lame = set() if named is None else {*named.senders, *named.receivers}
        rails = {pair: rate for pair, rate in found.between.gb_per_s.items() if not {*_hosts(layout, pair)} & lame}
        late = {pair: found.between.us[pair] for pair in rails}
        findings += judge_links("ranks of two hosts", rails, late, ranks, bits=True, only_warn=False)
    if whole and instance is not None:
        findings += judge_expected(rates, layout.names, instance.network_gbps, instance.type)
    if found.inside.left_out or found.between.left_out:
        left = plural(found.inside.left_out + found.between.left_out, "round")
        findings.append(Finding(check="pairs", level=Level.warning, what=f"{left} of pairs left out for want of time"))
    must_carry = on_gpu and hosts > 1 and found.efa_hosts == hosts
    return [*findings, *judge_counters(found.counted, must_carry=must_carry)]
