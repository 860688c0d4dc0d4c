"""Ways to spread a job over some machines, each with what it takes, best first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from strategies.activations import ActivationCheckpointing
from strategies.base import Footprint, Plan, Strategy, WorldSpec
from strategies.errors import ConfigError
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.facts import ModelFacts
from trainer.planner.memory import Memory, memory
from trainer.planner.speed import Compute, Speed, compute, speed


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the job leaves open, and what it doesn't."""

    facts: ModelFacts
    strategies: Mapping[str, Strategy]
    """By the words that choose them."""
    checkpointing: Mapping[str, ActivationCheckpointing | None]
    """Ways to keep fewer activations, by the words that choose them."""
    global_batch: int | None
    """Samples of a step over all ranks; None: as many as the largest micro-batch that fits takes."""
    micro_batch: int | None
    """None: whatever is best."""
    clip_norm: float | None = None
    compiled: bool = False
    cast: bool = False
    """As programs run that cast weights for a step (`Plan.cast_weights`)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way, and what it takes."""

    strategy: str
    """The words that choose it."""
    checkpointing: str
    plan: Plan
    machines: Machines
    footprint: Footprint
    memory: Memory
    speed: Speed | None
    fits: bool
    why_not: str = ""
    """What doesn't fit."""

    @property
    def usd_per_billion_tokens(self) -> float | None:
        """None: the price or the speed isn't known."""
        if self.speed is None or self.machines.price_per_h is None:
            return None
        return 1e9 / self.speed.tokens_per_s / 3600 * self.machines.price_per_h * self.machines.nodes

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Smaller is better: what fits, then what is fast, then what takes less; of what doesn't, what takes less."""
        fast = self.speed.tokens_per_s if self.speed is not None and self.fits else 0.0
        return (not self.fits, -fast, self.memory.total)


def search(wanted: Wanted, machines: Machines, factors: Efficiency) -> tuple[list[Candidate], dict[str, str]]:
    """The best candidate of each strategy and variant of it on all of `machines`.

    Returns:
        The candidates, best first; and for each strategy that can't run on so many ranks, why.
    """
    world = WorldSpec(size=machines.size, local_size=machines.devices)
    found, refused = list[Candidate](), dict[str, str]()
    computed: dict[tuple[int, str], Compute | None] = {}
    for name, chosen in wanted.strategies.items():
        for setting, strategy in chosen.variants(world):
            words = f"{name} {setting}".strip()
            try:
                each = [*_of(wanted, words, strategy, machines, factors, world, computed)]
            except ConfigError as error:
                refused[words] = str(error)
                continue
            if each:
                found.append(min(each, key=lambda candidate: candidate.rank))
    return sorted(found, key=lambda candidate: candidate.rank), refused


def _of(
    wanted: Wanted,
    words: str,
    strategy: Strategy,
    machines: Machines,
    factors: Efficiency,
    world: WorldSpec,
    computed: dict[tuple[int, str], Compute | None],
) -> Iterator[Candidate]:
    for way, how in wanted.checkpointing.items():
        for micro_batch, accumulation in _micro_batches(wanted, world.size):
            if (micro_batch, way) not in computed:
                trace = wanted.facts.trace(micro_batch, how)
                computed[micro_batch, way] = compute(trace, machines, factors, compiled=wanted.compiled)
            plan = _plan(wanted, micro_batch, accumulation, how)
            footprint = strategy.footprint(wanted.facts.spec, world, plan)
            candidate = _candidate(
                wanted, words, way, footprint, plan, machines, factors, computed[micro_batch, way]
            )  # fmt: skip
            yield candidate
            if not candidate.fits:
                break  # more samples take more


def _plan(wanted: Wanted, micro_batch: int, accumulation: int, how: ActivationCheckpointing | None) -> Plan:
    return Plan(
        micro_batch=micro_batch,
        accumulation=accumulation,
        clip_norm=wanted.clip_norm,
        precision=wanted.facts.precision,
        activation_checkpointing=how,
        compile=wanted.compiled,
        cast_weights=wanted.cast,
    )


def _candidate(
    wanted: Wanted,
    words: str,
    way: str,
    footprint: Footprint,
    plan: Plan,
    machines: Machines,
    factors: Efficiency,
    micro_batch: Compute | None,
) -> Candidate:
    facts = wanted.facts
    trace = facts.trace(plan.micro_batch, plan.activation_checkpointing)
    taken = memory(footprint, trace)
    why_not = _why_not(taken, machines)
    taken_s = None
    if micro_batch is not None:
        flops = facts.model_flops(plan.micro_batch)
        taken_s = speed(micro_batch, footprint, plan, machines, factors, model_flops=flops)
    return Candidate(
        strategy=words,
        checkpointing=way,
        plan=plan,
        machines=machines,
        footprint=footprint,
        memory=taken,
        speed=taken_s,
        fits=not why_not,
        why_not=why_not,
    )


def _why_not(taken: Memory, machines: Machines) -> str:
    gib = 2.0**30
    if taken.total > machines.memory_bytes:
        return f"{taken.total / gib:.1f} GiB of {machines.memory_bytes / gib:.1f} per device"
    host = machines.host_memory_bytes
    if taken.host and host is not None and taken.host * machines.devices > host:
        return f"{taken.host * machines.devices / gib:.0f} GiB of {host / gib:.0f} of host memory per node"
    if taken.nvme and machines.disk_bytes is not None and taken.nvme * machines.devices > machines.disk_bytes:
        return f"{taken.nvme * machines.devices / 1e9:.0f} GB of {machines.disk_bytes / 1e9:.0f} on a node's disks"
    return ""


def _micro_batches(wanted: Wanted, size: int) -> Iterator[tuple[int, int]]:
    """Micro-batches and how many of them make a rank's share of a step.

    Raises:
        ConfigError: the step's samples can't be dealt out.
    """
    if wanted.global_batch is None:
        sizes: Sequence[int] = [wanted.micro_batch] if wanted.micro_batch else [2**power for power in range(11)]
        yield from ((each, 1) for each in sizes)
        return
    share, left = divmod(wanted.global_batch, size)
    if left or not share:
        raise ConfigError(
            f"plan: {size} ranks can't have equal shares of trainer.global_batch={wanted.global_batch}. "
            f"Take a multiple of {size} (trainer.global_batch)."
        )
    if wanted.micro_batch is not None:
        if share % wanted.micro_batch:
            raise ConfigError(
                f"plan: trainer.micro_batch={wanted.micro_batch} doesn't divide a rank's {share} samples. "
                "Choose a divisor (trainer.micro_batch)."
            )
        yield wanted.micro_batch, share // wanted.micro_batch
        return
    yield from ((each, share // each) for each in range(1, share + 1) if share % each == 0)


def again(wanted: Wanted, candidate: Candidate, factors: Efficiency) -> Candidate:
    """The same way with other factors."""
    trace = wanted.facts.trace(candidate.plan.micro_batch, candidate.plan.activation_checkpointing)
    micro_batch = compute(trace, candidate.machines, factors, compiled=wanted.compiled)
    return _candidate(
        wanted, candidate.strategy, candidate.checkpointing, candidate.footprint, candidate.plan, candidate.machines,
        factors, micro_batch,
    )  # fmt: skip


def without_machines(wanted: Wanted, ranks: int) -> tuple[dict[str, tuple[Footprint, Memory]], dict[str, str]]:
    """What each strategy takes on one of so many ranks of one machine; and of those that can't run so, why."""
    world = WorldSpec(size=ranks, local_size=ranks)
    [(_, how), *_] = wanted.checkpointing.items()
    found, refused = dict[str, tuple[Footprint, Memory]](), dict[str, str]()
    for name, strategy in wanted.strategies.items():
        try:
            micro_batch, accumulation = next(iter(_micro_batches(wanted, ranks)))
            plan = _plan(wanted, micro_batch, accumulation, how)
            footprint = strategy.footprint(wanted.facts.spec, world, plan)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        found[name] = (footprint, memory(footprint, wanted.facts.trace(micro_batch, how)))
    return found, refused
