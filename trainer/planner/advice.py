"""What would make a job fit that doesn't, the cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from strategies.activations import ActivationCheckpointing
from strategies.base import Strategy
from strategies.errors import ConfigError
from trainer.planner.cluster import Cluster, Machines
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.search import WAYS, Candidate, Wanted, search

_MOST_NODES = 256
_MOST_LINES = 8
_SHORTEST = 128
"""Tokens of a sample."""
_BATCH = "another batch"
_GIB = 2**30

Again = Callable[[Sequence[str]], Wanted]
"""The same job with further keys, from the configuration on; raises ConfigError where it can't have them."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something with which a job fits."""

    words: str
    """The keys to set."""
    best: Candidate
    """What then is the best."""
    remark: str = ""
    """What it changes of what is learned."""

    @property
    def cost(self) -> tuple[float, bool, float]:
        """USD for an hour, whether something else is learned, and USD for 10^9 tokens; what isn't known comes last."""
        of_tokens, machines = self.best.usd_per_billion_tokens, self.best.machines
        of_hour = math.inf if machines.price_per_h is None else machines.price_per_h * machines.nodes
        return (of_hour, bool(self.remark), math.inf if of_tokens is None else of_tokens)

    def __str__(self) -> str:
        best, (of_hour, _, of_tokens) = self.best, self.cost
        kept = f", {best.checkpointing}" if best.checkpointing != "none" else ""
        limit = best.machines.memory_bytes / _GIB
        said = [f"{best.memory.total / _GIB:.1f} of {limit:.1f} GiB with {best.strategy}{kept}"]
        said += [f"{of_hour:,.2f} USD/h"] if of_hour < math.inf else []
        said += [f"{of_tokens:,.{0 if of_tokens >= 10 else 2}f} USD/10^9 tokens"] if of_tokens < math.inf else []
        return "; ".join([f"{self.words}: {', '.join(said)}", *([self.remark] if self.remark else [])])


def lines(changes: Sequence[Change]) -> list[str]:
    """The cheapest few in words, from `found`."""
    return [str(change) for change in changes[:_MOST_LINES]]


def found(
    wanted: Wanted,
    machines: Machines,
    factors: Efficiency,
    *,
    optimizers: Mapping[str, float],
    clusters: Mapping[str, Cluster],
    strategies: Mapping[str, Strategy] | None = None,
    again: Again | None = None,
    length: int | None = None,
    price_share: float = 1.0,
) -> list[Change]:
    """Single changes with which something fits, by the price of an hour; of those that cost the same, first what
    changes nothing of what is learned, and then by what 10^9 tokens cost.

    Args:
        wanted: the job, of which nothing fits.
        machines: on which it doesn't.
        factors: of their devices.
        optimizers: choice -> moments that it keeps for each trained number.
        clusters: choice -> machines that could be rented instead.
        strategies: all there are; None: no other one is tried.
        again: makes the job with further keys; None: none are tried that change the model or its samples.
        length: tokens of a sample, if `data.length` says it.
        price_share: of the price of other machines that is paid.
    """
    at_hand = _AtHand(machines, factors)
    tried = [
        *_of_the_settings(wanted, at_hand, strategies or {}),
        *_of_the_optimizer(wanted, at_hand, optimizers),
        *(() if again is None else _of_the_model(wanted, at_hand, again, length)),
        *_of_the_machines(wanted, at_hand, clusters, price_share),
    ]
    return sorted(tried, key=lambda change: change.cost)


@dataclass(frozen=True)
class _AtHand:
    machines: Machines
    factors: Efficiency

    def best(self, wanted: Wanted) -> Candidate | None:
        """None: nothing fits."""
        try:
            candidates, _ = search(wanted, self.machines, self.factors)
        except ConfigError:
            return None
        return candidates[0] if candidates and candidates[0].fits else None

    def change(self, wanted: Wanted, words: str, remark: str = "") -> Iterator[Change]:
        """With these words, if something fits then."""
        if (best := self.best(wanted)) is not None:
            yield Change(words=words, best=best, remark=remark)


def _of_the_settings(wanted: Wanted, at_hand: _AtHand, strategies: Mapping[str, Strategy]) -> Iterator[Change]:
    """Those that change nothing of what is learned, and the batch."""
    for name in strategies.keys() - wanted.strategies.keys():
        other = replace(wanted, strategies={name: strategies[name]})
        if (best := at_hand.best(other)) is not None:
            yield Change(words=f"strategy={best.strategy}", best=best)
    for name, strategy in wanted.strategies.items() if len(wanted.strategies) == 1 else ():
        for key, value in asdict(strategy).items():
            if isinstance(value, bool):
                words = f"strategy.{key}={str(not value).lower()}"
                changed = {f"{name} {words}": replace(strategy, **{key: not value})}
                yield from at_hand.change(replace(wanted, strategies=changed), words)
    for way in WAYS.keys() - wanted.checkpointing.keys():
        how: Mapping[str, ActivationCheckpointing | None] = {way: WAYS[way]}
        if way in ("selective", "full"):
            words = f"trainer.activation_checkpointing={way}"
            yield from at_hand.change(replace(wanted, checkpointing=how), words)
    size = at_hand.machines.size
    fewer = [*at_hand.change(replace(wanted, micro_batch=1), "trainer.micro_batch=1")] if wanted.micro_batch else []
    yield from fewer
    if wanted.global_batch is not None and not fewer:
        words = f"trainer.micro_batch=1 trainer.global_batch={size}"
        yield from at_hand.change(replace(wanted, global_batch=size, micro_batch=1), words, _BATCH)


def _of_the_optimizer(wanted: Wanted, at_hand: _AtHand, optimizers: Mapping[str, float]) -> Iterator[Change]:
    spec = wanted.facts.spec
    for name, fewer in sorted(optimizers.items(), key=lambda entry: -entry[1]):
        if fewer < spec.slots_per_parameter:
            facts = replace(wanted.facts, spec=replace(spec, slots_per_parameter=fewer))
            change = [*at_hand.change(replace(wanted, facts=facts, footprints={}), f"optimizer={name}")]
            if change:
                yield replace(change[0], remark="it needs another rate")
                return


def _of_the_model(wanted: Wanted, at_hand: _AtHand, again: Again, length: int | None) -> Iterator[Change]:
    """Those that shorten what comes and goes in a step, where that could be enough."""
    try:
        candidates, _ = search(wanted, at_hand.machines, at_hand.factors)
    except ConfigError:
        return
    least = min((it.memory.total - it.memory.activations - it.memory.logits for it in candidates), default=None)
    if least is None or least > at_hand.machines.memory_bytes:
        return
    if any(it.memory.logits for it in candidates):
        yield from _again(at_hand, again, "model.loss_chunk=1024", "")
    shorter = 0 if length is None else length // 2
    while shorter >= _SHORTEST:
        if change := [*_again(at_hand, again, f"data.length={shorter}", "shorter samples")]:
            yield from change
            return
        shorter //= 2


def _again(at_hand: _AtHand, again: Again, words: str, remark: str) -> Iterator[Change]:
    try:
        wanted = again([words])
    except ConfigError:  # not of this model
        return
    yield from at_hand.change(wanted, words, remark)


def _of_the_machines(
    wanted: Wanted, at_hand: _AtHand, clusters: Mapping[str, Cluster], price_share: float
) -> Iterator[Change]:
    machines, numbers = at_hand.machines, wanted.facts.precision.numbers
    yield from _more_nodes(wanted, at_hand, 2 * machines.nodes, "cluster.nodes={nodes}")
    for name, cluster in clusters.items():
        try:
            other = replace(cluster, measure=False).facts(numbers)
        except ConfigError:  # the machine at hand, or one without such a peak
            continue
        if other.name == machines.name:
            continue
        if other.price_per_h is not None:
            other = replace(other, price_per_h=price_share * other.price_per_h)
        there = _AtHand(other, efficiency_of(other.device, numbers))
        yield from _more_nodes(wanted, there, 1, f"cluster={name} cluster.nodes={{nodes}}")


def _more_nodes(wanted: Wanted, at_hand: _AtHand, first: int, words: str) -> Iterator[Change]:
    """The fewest of 2, 4, 8 ... times as many."""
    least = replace(wanted, checkpointing=dict(list(wanted.checkpointing.items())[-1:]))  # keeps the fewest
    nodes = first
    while nodes <= _MOST_NODES:
        there = _AtHand(at_hand.machines.on(nodes), at_hand.factors)
        size, batch = there.machines.size, wanted.global_batch
        uneven = batch is not None and batch % (size * (wanted.micro_batch or 1))
        batch = batch if not uneven else size * (wanted.micro_batch or 1)
        if there.best(replace(least, global_batch=batch)) is not None:
            said = words.format(nodes=nodes) + (f" trainer.global_batch={batch}" if uneven else "")
            yield from there.change(replace(wanted, global_batch=batch), said, _BATCH if uneven else "")
            return
        nodes *= 2
