"""What would make a job fit that doesn't, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from strategies.errors import ConfigError
from trainer.planner.cluster import Cluster, Machines
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.search import Candidate, Wanted, search

_MOST_NODES = 256
_GIB = 2**30


def changes(
    wanted: Wanted,
    machines: Machines,
    factors: Efficiency,
    *,
    optimizers: Mapping[str, float],
    clusters: Mapping[str, Cluster],
) -> list[str]:
    """Single changes with which something fits: those of the job first, then other machines, by price.

    Args:
        wanted: the job, of which nothing fits.
        machines: on which it doesn't.
        factors: of their devices.
        optimizers: choice -> moments that it keeps for each trained number.
        clusters: choice -> machines that could be rented instead.
    """
    found = [
        *_of_the_job(wanted, machines, factors, optimizers),
        *_of_the_machines(wanted, machines, factors, clusters),
    ]
    found.sort(key=lambda entry: entry[0])
    return [line for _, line in found[:6]]


def _best(wanted: Wanted, machines: Machines, factors: Efficiency) -> Candidate | None:
    try:
        candidates, _ = search(wanted, machines, factors)
    except ConfigError:
        return None
    return candidates[0] if candidates and candidates[0].fits else None


def _of_the_job(
    wanted: Wanted, machines: Machines, factors: Efficiency, optimizers: Mapping[str, float]
) -> Iterator[tuple[float, str]]:
    price = (machines.price_per_h or 0.0) * machines.nodes
    slots = wanted.facts.spec.slots_per_parameter
    for name, fewer in sorted(optimizers.items(), key=lambda entry: -entry[1]):
        if fewer < slots:
            facts = replace(wanted.facts, spec=replace(wanted.facts.spec, slots_per_parameter=fewer))
            if (best := _best(replace(wanted, facts=facts), machines, factors)) is not None:
                yield price, f"optimizer={name}: {_taken(best)}, and another rate to find"
                break
    if wanted.global_batch is not None or (wanted.micro_batch or 1) > 1:
        open_ = replace(wanted, global_batch=None, micro_batch=1)
        if (best := _best(open_, machines, factors)) is not None:
            yield price, f"trainer.micro_batch=1 trainer.global_batch={machines.size}: {_taken(best)}"


def _of_the_machines(
    wanted: Wanted, machines: Machines, factors: Efficiency, clusters: Mapping[str, Cluster]
) -> Iterator[tuple[float, str]]:
    if (line := _more_nodes(wanted, machines, factors, machines.nodes * 2, "cluster.nodes={nodes}")) is not None:
        yield line
    for name, cluster in clusters.items():
        numbers = wanted.facts.precision.numbers
        try:
            other = replace(cluster, measure=False).facts(numbers)
        except ConfigError:  # the machine at hand, or one without such a peak
            continue
        if other.name == machines.name:
            continue
        words = f"cluster={name} cluster.nodes={{nodes}}"
        if (line := _more_nodes(wanted, other, efficiency_of(other.device, numbers), 1, words)) is not None:
            yield line


def _more_nodes(
    wanted: Wanted, machines: Machines, factors: Efficiency, first: int, words: str
) -> tuple[float, str] | None:
    nodes = first
    while nodes <= _MOST_NODES:
        size = nodes * machines.devices
        batch = wanted.global_batch
        if batch is not None and batch % size:
            batch = None
        if (best := _best(replace(wanted, global_batch=batch), machines.on(nodes), factors)) is not None:
            said = f"{words.format(nodes=nodes)}: {_taken(best)}"
            if machines.price_per_h is None:
                return float("inf"), said
            return machines.price_per_h * nodes, f"{said}, {machines.price_per_h * nodes:,.2f} USD/h"
        nodes *= 2
    return None


def _taken(best: Candidate) -> str:
    kept = f", {best.checkpointing}" if best.checkpointing != "none" else ""
    return f"{best.memory.total / _GIB:.1f} of {best.machines.memory_bytes / _GIB:.1f} GiB with {best.strategy}{kept}"
