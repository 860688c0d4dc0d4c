"""Ways to spread a job over some machines, each with what it takes, best first."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing
from strategies.base import Footprint, Plan, Strategy, WorldSpec
from strategies.errors import ConfigError
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.facts import ModelFacts
from trainer.planner.memory import Memory, memory
from trainer.planner.speed import Compute, Speed, compute, speed
from trainer.planner.stages import Trace

WAYS: Mapping[str, ActivationCheckpointing | None] = {
    "none": None,
    "selective": ActivationCheckpointing(keep=COSTLY_OPERATORS),
    "selective/2": ActivationCheckpointing(keep=COSTLY_OPERATORS, products_every=2),
    "full": ActivationCheckpointing(),
}
"""Ways to keep activations, the most first."""
_AS_FAST = 0.01
"""Part of the speed that makes no difference."""


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
    footprints: dict[tuple[str, int, int, int, str], Footprint] = field(default_factory=dict, compare=False, repr=False)
    """What is known of strategies by now: the same on all machines that have as many devices."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way, and what it takes."""

    strategy: str
    """The words that choose it."""
    spread: Strategy
    """With the settings that they choose."""
    checkpointing: str
    plan: Plan
    machines: Machines
    footprint: Footprint
    memory: Memory
    speed: Speed | None
    """None: a rate isn't known, or nobody asked."""
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
    def name(self) -> str:
        """The strategy's, without its settings."""
        return self.strategy.partition(" ")[0]

    @property
    def world(self) -> WorldSpec:
        """Its ranks."""
        return WorldSpec(size=self.machines.size, local_size=self.machines.devices)

    @property
    def rank(self) -> tuple[bool, float, int, int]:
        """Smaller is better: what fits, then what is fast, then what takes less, then what needs fewer libraries; of
        what doesn't fit, what takes less.
        """
        fast = self.speed.tokens_per_s if self.speed is not None and self.fits else 0.0
        return (not self.fits, -fast, self.memory.total, len(self.spread.libraries))


def search(
    wanted: Wanted, machines: Machines, factors: Efficiency, say: Callable[[str], None] = lambda doing: None
) -> tuple[list[Candidate], dict[str, str]]:
    """The best candidate of each strategy and variant of it on all of `machines`.

    Args:
        wanted: the job.
        machines: all of them take part.
        factors: of their devices.
        say: hears what is being looked at.

    Returns:
        The candidates, best first: of those within 1 % of the fastest the one that needs the fewest libraries. And for
        each strategy that can't run on so many ranks, why.
    """
    world = WorldSpec(size=machines.size, local_size=machines.devices)
    found, refused = list[Candidate](), dict[str, str]()
    micro_batches = _MicroBatches(wanted, machines, factors)
    for name, chosen in wanted.strategies.items():
        for setting, strategy in chosen.variants(world):
            words = f"{name} {setting}".strip()
            say(f"{machines.nodes} x {machines.name}: {words}")
            try:
                each = [*_of(micro_batches, words, strategy, world)]
            except ConfigError as error:
                refused[words] = str(error)
                continue
            if each:
                found.append(min(each, key=lambda candidate: candidate.rank))
    found.sort(key=lambda candidate: candidate.rank)
    if found and found[0].fits:
        first = _preferred(found)
        found = [first, *(each for each in found if each is not first)]
    return found, refused


def least(wanted: Wanted, machines: Machines, factors: Efficiency) -> Iterator[Candidate]:
    """Of each strategy and variant what takes least: the smallest micro-batch, with the fewest activations kept. How
    fast that is isn't looked at.

    Args:
        wanted: the job.
        machines: all of them take part.
        factors: of their devices.
    """
    world = WorldSpec(size=machines.size, local_size=machines.devices)
    fewest = dict([*wanted.checkpointing.items()][-1:])
    micro_batches = _MicroBatches(replace(wanted, checkpointing=fewest), machines, factors)
    for name, chosen in wanted.strategies.items():
        for setting, strategy in chosen.variants(world):
            with contextlib.suppress(ConfigError):  # it can't run on so many ranks
                each = _of(micro_batches, f"{name} {setting}".strip(), strategy, world, timed=False)
                yield from itertools.islice(each, 1)


def _preferred(found: Sequence[Candidate]) -> Candidate:
    """Of those that are as fast as the first, for all that predictions can tell: what needs the fewest libraries."""
    fastest = found[0].speed.tokens_per_s if found[0].speed is not None else 0.0
    as_fast = [
        each
        for each in found
        if each.fits and each.speed is not None and each.speed.tokens_per_s >= (1 - _AS_FAST) * fastest
    ]
    return min(as_fast or found[:1], key=lambda each: len(each.spread.libraries))


class _MicroBatches:
    """All that a search has looked at on one kind of machine; the same under every strategy."""

    def __init__(self, wanted: Wanted, machines: Machines, factors: Efficiency) -> None:
        self.wanted, self.machines, self.factors = wanted, machines, factors
        self._known: dict[tuple[int, ActivationCheckpointing | None], Compute | None] = {}

    def trace(self, plan: Plan) -> Trace:
        """One of the plan's size."""
        return self.wanted.facts.trace(plan.micro_batch, plan.activation_checkpointing)

    def speed(self, footprint: Footprint, plan: Plan) -> Speed | None:
        """None: a rate isn't known that it hangs on."""
        key = (plan.micro_batch, plan.activation_checkpointing)
        if key not in self._known:
            self._known[key] = compute(self.trace(plan), self.machines, self.factors, compiled=self.wanted.compiled)
        if (one := self._known[key]) is None:
            return None
        own = self.wanted.facts.model_flops(plan.micro_batch)
        return speed(one, footprint, plan, self.machines, self.factors, model_flops=own)


def _of(
    micro_batches: _MicroBatches, words: str, strategy: Strategy, world: WorldSpec, *, timed: bool = True
) -> Iterator[Candidate]:
    wanted = micro_batches.wanted
    for way, how in wanted.checkpointing.items():
        for samples, accumulation in _micro_batches(wanted, world.size):
            plan = _plan(wanted, samples, accumulation, how)
            # Samples change nothing of it: activations are the trace's to say.
            key = (words, world.size, world.local_size, accumulation, way)
            if key not in wanted.footprints:
                wanted.footprints[key] = strategy.footprint(wanted.facts.spec, world, plan)
            candidate = _candidate(micro_batches, words, strategy, way, wanted.footprints[key], plan, timed=timed)
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
    micro_batches: _MicroBatches,
    words: str,
    strategy: Strategy,
    way: str,
    footprint: Footprint,
    plan: Plan,
    *,
    timed: bool = True,
) -> Candidate:
    machines = micro_batches.machines
    taken = memory(footprint, micro_batches.trace(plan), machines.memory_bytes)
    why_not = _why_not(taken, machines)
    return Candidate(
        strategy=words,
        spread=strategy,
        checkpointing=way,
        plan=plan,
        machines=machines,
        footprint=footprint,
        memory=taken,
        speed=micro_batches.speed(footprint, plan) if timed else None,
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
    yield from ((each, share // each) for each in _divisors(share))


def refuse_uneven(wanted: Wanted, size: int) -> None:
    """Before anything is computed.

    Raises:
        ConfigError: so many ranks can't have equal shares of the samples of a step.
    """
    next(_micro_batches(wanted, size))


@functools.cache
def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def impossible(wanted: Wanted, refused: Mapping[str, str]) -> dict[str, str]:
    """Of strategies that were refused, those that can't do the job on one rank either, and why."""
    alone, found = WorldSpec(size=1, local_size=1), dict[str, str]()
    [(_, how), *_] = wanted.checkpointing.items()
    for name, why in refused.items():
        try:
            wanted.strategies[name.partition(" ")[0]].footprint(wanted.facts.spec, alone, _plan(wanted, 1, 1, how))
        except ConfigError:
            found[name] = why
    return found


def again(wanted: Wanted, candidate: Candidate, factors: Efficiency) -> Candidate:
    """The same way with other factors."""
    it = candidate
    micro_batches = _MicroBatches(wanted, it.machines, factors)
    return _candidate(micro_batches, it.strategy, it.spread, it.checkpointing, it.footprint, it.plan)


@dataclass(frozen=True, kw_only=True)
class WithoutMachines:
    """What a strategy takes on one of so many ranks, wherever they are."""

    strategy: str
    spread: Strategy
    plan: Plan
    world: WorldSpec
    footprint: Footprint
    memory: Memory

    @property
    def name(self) -> str:
        """The strategy's."""
        return self.strategy

    @property
    def sent_bytes(self) -> int:
        """Whole tensors of all collectives of a step."""
        return sum(each.payload_bytes * each.count for each in self.footprint.collectives)


def without_machines(wanted: Wanted, ranks: int) -> tuple[dict[str, WithoutMachines], dict[str, str]]:
    """What each strategy takes on one of so many ranks of one machine, the least first; and of others, why they can't
    run so.
    """
    world = WorldSpec(size=ranks, local_size=ranks)
    [(_, how), *_] = wanted.checkpointing.items()
    found, refused = dict[str, WithoutMachines](), dict[str, str]()
    micro_batch, accumulation = next(iter(_micro_batches(wanted, ranks)))
    plan = _plan(wanted, micro_batch, accumulation, how)
    for name, strategy in wanted.strategies.items():
        try:
            footprint = strategy.footprint(wanted.facts.spec, world, plan)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        taken = memory(footprint, wanted.facts.trace(micro_batch, how))
        found[name] = WithoutMachines(
            strategy=name, spread=strategy, plan=plan, world=world, footprint=footprint, memory=taken
        )
    return dict(sorted(found.items(), key=lambda entry: entry[1].memory.total)), refused
