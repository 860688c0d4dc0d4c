"""`strategy=auto`: which strategy a job is trained with on the machines that it was started on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing
from strategies.errors import ConfigError, nearest
from strategies.footprint import WorldSpec
from strategies.precision import Numbers
from trainer.micro_batch import SAFE
from trainer.planner.cluster import Cluster, Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.search import Candidate, Wanted, search
from trainer.planner.work import Rates

_AS_GOOD = 0.05
"""Part of the speed by which predictions of two strategies have to differ before one counts as faster."""
_GIB = 2**30

WAYS: Mapping[str, tuple[ActivationCheckpointing | None, Sequence[str]]] = {
    "none": (None, ()),
    "selective": (ActivationCheckpointing(keep=COSTLY_OPERATORS), ("trainer.activation_checkpointing=selective",)),
    "selective/2": (
        ActivationCheckpointing(keep=COSTLY_OPERATORS, products_every=2),
        ("trainer.activation_checkpointing=selective", "trainer.activation_checkpointing_products_every=2"),
    ),
    "full": (ActivationCheckpointing(), ("trainer.activation_checkpointing=full",)),
}
"""Ways to keep fewer activations, and the words that choose them."""


@dataclass(kw_only=True)
class Auto:
    """The strategy that is predicted to be the fastest of those that fit into memory.

    Its settings go with it, the micro-batch where that is null, and activation checkpointing where nothing fits
    without. It is chosen anew at each start. `cluster` says on which machines; by default they are looked at.
    """

    among: list[str] = field(default_factory=list)
    """Choose only from these, by the words that `strategy=` takes; empty: from all but those that keep weights or
    moments on NVMe, since nobody knows how fast the disks are."""

    def chosen_from(self, strategies: Mapping[str, object]) -> list[str]:
        """The names to look at.

        Args:
            strategies: all that there are, by name.

        Raises:
            ConfigError: one of `among` isn't a strategy.
        """
        for name in self.among:
            if name not in strategies:
                raise ConfigError(f"strategy=auto: {name!r} is not a strategy. {nearest(name, strategies)} "
                                  "(strategy.among).")  # fmt: skip
        return list(dict.fromkeys(self.among)) or list(strategies)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank finds on its machine, before anything is connected."""

    device: str
    """CUDA's name of it, or `cpu`."""
    memory_bytes: float
    """Free on its device; on processors its share of what is free."""
    host_memory_bytes: float
    disk_bytes: float
    flops: float | None = None
    """Matrix products in a second, all ranks at once; None: the peak is in a table."""
    copied_bytes_per_s: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    """Strategies that can't run on this machine, and why."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was decided."""

    words: Sequence[str]
    """As on the command line: the strategy first, then settings."""
    lines: Sequence[str]
    """For the log: which and why, and what came second."""
    rates: Rates | None = None
    """That were reckoned with; None on ranks that were only told."""


def machines_of(
    cluster: Cluster | None,
    seen: Sequence[Seen],
    *,
    size: int,
    local_size: int,
    link: float | None,
    numbers: Numbers,
    instance: str | None = None,
) -> Machines:
    """The machines of a launch, each as the weakest of them.

    Args:
        cluster: as it was configured; what it leaves open is filled in with what was seen if it means these machines.
        seen: of every rank.
        size: ranks.
        local_size: ranks of one machine.
        link: bytes per second that a rank sends in a collective of its machine, as measured; None: not measured.
        numbers: what the job computes in.
        instance: EC2's type of these machines, if its numbers are known.

    Raises:
        ConfigError: the cluster isn't what was started, or what a prediction needs isn't known.
    """
    nodes = -(-size // local_size)
    if cluster is not None and not cluster.measure:
        found = cluster.facts(numbers)
        if (found.nodes, found.devices) != (nodes, local_size):
            raise ConfigError(
                f"strategy=auto: the cluster has {found.nodes} x {found.devices} devices, and there are {nodes} x "
                f"{local_size} processes. Start as many, or say so with cluster.nodes={nodes} "
                f"cluster.devices={local_size} (cluster)."
            )
        return found
    own = Cluster() if cluster is None else cluster
    if own.devices not in (None, local_size) or own.nodes not in (1, nodes):
        raise ConfigError(
            f"strategy=auto: cluster.nodes={own.nodes} and cluster.devices={own.devices}, and there are {nodes} x "
            f"{local_size} processes. Leave them out (cluster.nodes, cluster.devices)."
        )
    device, *others = sorted({each.device for each in seen})
    filled = {
        "memory_gib": min(each.memory_bytes for each in seen) / _GIB,
        "host_memory_gib": min(each.host_memory_bytes for each in seen) / _GIB,
        "disk_gb": min(each.disk_bytes for each in seen) / 1e9,
        "peak_tflops": _least([each.flops for each in seen], 1e12),
        "memory_gb_per_s": _least([each.copied_bytes_per_s for each in seen], 1e9),
        "link_gb_per_s": None if link is None else link / 1e9,
    }
    given = {key: value for key, value in asdict(own).items() if value is not None}
    values = {**{key: value for key, value in filled.items() if value}, **given}
    values |= {"measure": False, "nodes": nodes, "devices": local_size}
    if instance is None or device == "cpu":
        values["device"] = device
    else:  # its links are those of the table
        values = {key: value for key, value in values.items() if key not in ("disk_gb", "host_memory_gib")}
        values |= {"instance": instance, **given, "measure": False, "nodes": nodes, "devices": local_size}
    name = "this machine" if nodes == 1 else "these machines"
    return replace(Cluster(**values).facts(numbers), name=name if not others else f"{name}, not all alike")


def _least(values: Sequence[float | None], unit: float) -> float | None:
    known = [value for value in values if value]
    return min(known) / unit if known else None


def choose(
    wanted: Wanted,
    machines: Machines,
    factors: Efficiency,
    *,
    with_nvme: bool = False,
    elementwise: bool = True,
    own_checkpointing: bool = False,
) -> tuple[Candidate | None, list[Candidate], dict[str, str]]:
    """The best candidate that fits, None where none does; the others, from the best on; and what can't run, and why.

    Args:
        wanted: the job, with the strategies that can run.
        machines: on which it was started.
        factors: of their devices.
        with_nvme: those on NVMe may be taken too.
        elementwise: the optimizer works number by number, so that a strategy may cut what it steps.
        own_checkpointing: `wanted.checkpointing` was chosen by the user.
    """
    room = replace(machines, memory_bytes=int(SAFE * machines.memory_bytes))
    every: Mapping[str, ActivationCheckpointing | None] = {name: how for name, (how, _) in WAYS.items()}
    ways = [wanted.checkpointing] if own_checkpointing else [{"none": None}, every]
    found, refused = list[Candidate](), dict[str, str]()
    for checkpointing in ways:
        candidates, refused = search(replace(wanted, checkpointing=checkpointing), room, factors)
        found = [each for each in candidates if _may_be(each, wanted, with_nvme=with_nvme, elementwise=elementwise)]
        if fitting := [each for each in found if each.fits]:
            first, *others = _by_preference(fitting, wanted)
            return first, others, refused
    return None, found, refused


def _may_be(candidate: Candidate, wanted: Wanted, *, with_nvme: bool, elementwise: bool) -> bool:
    taken, spec = candidate.footprint, wanted.facts.spec
    if taken.nvme_bytes and not with_nvme:
        return False
    if taken.host_bytes and candidate.machines.on_processors:
        return False  # it is the same memory
    whole = spec.num_trainable * wanted.facts.precision.master_dtype.itemsize
    cut = min(taken.weights_bytes, taken.gradients_bytes) < 0.99 * whole
    return elementwise or not (cut or taken.moments_bytes < 0.99 * whole * spec.slots_per_parameter)


def _by_preference(fitting: Sequence[Candidate], wanted: Wanted) -> list[Candidate]:
    """The fastest; of those that are as good, what needs the fewest libraries, sends least and takes least."""
    speeds = [0.0 if each.speed is None else each.speed.tokens_per_s for each in fitting]
    enough = (1 - _AS_GOOD) * max(speeds)
    as_good = [each for each, reached in zip(fitting, speeds, strict=True) if reached >= enough]
    others = [each for each, reached in zip(fitting, speeds, strict=True) if reached < enough]
    return [*sorted(as_good, key=lambda each: _simpler(each, wanted)), *sorted(others, key=lambda each: each.rank)]


def _simpler(candidate: Candidate, wanted: Wanted) -> tuple[int, float, int]:
    passes = {"all_reduce": 2}
    sent = sum(passes.get(c.kind, 1) * c.count * c.payload_bytes for c in candidate.footprint.collectives)
    libraries = wanted.strategies[candidate.strategy.split()[0]].libraries
    return len(libraries) + bool(candidate.footprint.host_bytes), sent, candidate.memory.total


def chosen_words(best: Candidate, wanted: Wanted, *, own_checkpointing: bool) -> list[str]:
    """What would be given on the command line for it."""
    name, *settings = best.strategy.split()
    micro_batch = [] if wanted.micro_batch else [f"trainer.micro_batch={best.plan.micro_batch}"]
    return [f"strategy={name}", *settings, *micro_batch, *(() if own_checkpointing else WAYS[best.checkpointing][1])]


def said(best: Candidate, others: Sequence[Candidate], words: Sequence[str]) -> list[str]:
    """The choice with its reason, and the runner-up; a line each."""
    of = f"{best.machines.size} x {best.machines.device} ({best.machines.name})"
    lines = [f"strategy=auto: {' '.join(words)}: {taken(best)} predicted on {of}"]
    if best.checkpointing != "none":
        lines[0] += "; without activation checkpointing nothing fits"
    if others:
        second = others[0]
        times = "" if best.speed is None or second.speed is None else _times(second.speed.step_s / best.speed.step_s)
        lines.append(f"runner-up: strategy={second.strategy}: {taken(second)}{times}")
    else:
        lines.append("runner-up: none, nothing else fits or can run here")
    return lines


def _times(ratio: float) -> str:
    if abs(ratio - 1) < _AS_GOOD:
        return "; as fast as predictions can tell, and needs more libraries, messages or memory"
    return f"; {ratio:.2f} times as long"


def taken(candidate: Candidate) -> str:
    """Memory and time in words."""
    memory = (
        f"{candidate.memory.total / _GIB:,.2f} of {candidate.machines.memory_bytes / SAFE / _GIB:,.2f} GiB per rank"
    )
    if candidate.speed is None:
        return f"{memory} (how fast isn't known: it sends least)"
    return f"{memory}, {candidate.speed.step_s:.3g} s per step, {candidate.speed.tokens_per_s:,.0f} tokens/s"


def one_machine(wanted: Wanted, machines: Machines, factors: Efficiency, best: Candidate) -> str | None:
    """What one of several machines would do by itself, where the job fits on it; for whoever pays for them."""
    if machines.nodes == 1:
        return None
    try:
        candidates, _ = search(wanted, replace(machines.on(1), memory_bytes=int(SAFE * machines.memory_bytes)), factors)
    except ConfigError:
        return None
    if not candidates or not candidates[0].fits:
        return None
    alone = candidates[0]
    if alone.speed is None or best.speed is None:
        return f"one machine holds it too: strategy={alone.strategy}, {taken(alone)}"
    share = best.speed.tokens_per_s / alone.speed.tokens_per_s
    return (
        f"one machine holds it too: strategy={alone.strategy}, {taken(alone)}; these {machines.nodes} are "
        f"{share:.1f} times as fast for {machines.nodes} times the price"
    )


def none_fits(found: Sequence[Candidate], advice: Sequence[str], refused: Mapping[str, str]) -> ConfigError:
    """One line: what comes nearest, and what would help."""
    if not found:
        why = next(iter(refused.values()), "there is no strategy to choose from")
        return ConfigError(f"strategy=auto: no strategy can run here; the first one: {why}")
    nearest_ = min(found, key=lambda each: each.rank)
    help_ = f"It would with {'; or '.join(advice[:2])}" if advice else "Use a smaller model, or more or larger machines"
    world = WorldSpec(size=nearest_.machines.size, local_size=nearest_.machines.devices)
    return ConfigError(
        f"strategy=auto: nothing fits on {world.size} ranks. The least takes strategy={nearest_.strategy}: "
        f"{nearest_.why_not} (a part of the memory is left free). {help_} (strategy, model, cluster)."
    )
