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
from trainer.planner.search import WAYS, Candidate, Wanted, least, search

_MOST_NODES = 256
_MOST = 8
"""Changes that are told."""
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
    usd_per_h: float
    """0: machines at hand whose price isn't known; infinite: others of which it isn't."""

    @property
    def cost(self) -> tuple[float, bool, float]:
        """USD for an hour, whether something else is learned, and USD for 10^9 tokens; what isn't known comes last."""
        of_tokens = self.best.usd_per_billion_tokens
        return (self.usd_per_h, bool(self.remark), math.inf if of_tokens is None else of_tokens)

    def __str__(self) -> str:
        best, (of_hour, _, of_tokens) = self.best, self.cost
        kept = f", {best.checkpointing}" if best.checkpointing != "none" else ""
        limit = best.machines.memory_bytes / _GIB
        said = [f"{best.memory.total / _GIB:.1f} of {limit:.1f} GiB with {best.strategy}{kept}"]
        said += [f"{of_hour:,.2f} USD/h"] if 0 < of_hour < math.inf else []
        said += [f"{of_tokens:,.{0 if of_tokens >= 10 else 2}f} USD/10^9 tokens"] if of_tokens < math.inf else []
        return "; ".join([f"{self.words}: {', '.join(said)}", *([self.remark] if self.remark else [])])


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
    """The cheapest single changes with which something fits, by the price of an hour; of those that cost the same,
    first what changes nothing of what is learned, and then by what 10^9 tokens cost.

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
    at_hand = _AtHand(machines, factors, unpriced=0.0)
    tried = [
        *_of_the_settings(wanted, at_hand, strategies or {}),
        *_of_the_optimizer(wanted, at_hand, optimizers),
        *(() if again is None else _of_the_model(wanted, at_hand, again, length)),
        *_of_the_machines(wanted, at_hand, clusters, price_share),
    ]
    # What is best takes far longer to tell than whether anything fits.
    cheapest = sorted(tried, key=lambda each: each.cost)[:_MOST]
    return sorted((each.change() for each in cheapest), key=lambda change: change.cost)


@dataclass(frozen=True)
class _AtHand:
    machines: Machines
    factors: Efficiency
    unpriced: float = math.inf
    """What an hour counts as where no price is known."""

    @property
    def usd_per_h(self) -> float:
        price = self.machines.price_per_h
        return self.unpriced if price is None else price * self.machines.nodes

    def with_(self, wanted: Wanted, words: str, remark: str = "") -> Iterator[_Possible]:
        """The job with these words, if something fits then."""
        if any(candidate.fits for candidate in least(wanted, self.machines, self.factors)):
            yield _Possible(wanted, self, words, remark)


@dataclass(frozen=True)
class _Possible:
    """Something with which a job fits; what then is best isn't known yet."""

    wanted: Wanted
    at_hand: _AtHand
    words: str
    """With `{strategy}` for the best one's."""
    remark: str

    @property
    def cost(self) -> tuple[float, bool]:
        """USD for an hour, and whether something else is learned."""
        return (self.at_hand.usd_per_h, bool(self.remark))

    def change(self) -> Change:
        [best, *_], _ = search(self.wanted, self.at_hand.machines, self.at_hand.factors)
        words = self.words.format(strategy=best.strategy)
        return Change(words=words, best=best, remark=self.remark, usd_per_h=self.at_hand.usd_per_h)


def _of_the_settings(wanted: Wanted, at_hand: _AtHand, strategies: Mapping[str, Strategy]) -> Iterator[_Possible]:
    """Those that change nothing of what is learned, and the batch."""
    for name in strategies.keys() - wanted.strategies.keys():
        other = replace(wanted, strategies={name: strategies[name]})
        yield from at_hand.with_(other, "strategy={strategy}")
    for name, strategy in wanted.strategies.items() if len(wanted.strategies) == 1 else ():
        for key, value in asdict(strategy).items():
            if isinstance(value, bool):
                words = f"strategy.{key}={str(not value).lower()}"
                changed = {f"{name} {words}": replace(strategy, **{key: not value})}
                yield from at_hand.with_(replace(wanted, strategies=changed), words)
    for way in WAYS.keys() - wanted.checkpointing.keys():
        how: Mapping[str, ActivationCheckpointing | None] = {way: WAYS[way]}
        if way in ("selective", "full"):
            words = f"trainer.activation_checkpointing={way}"
            yield from at_hand.with_(replace(wanted, checkpointing=how), words)
    size = at_hand.machines.size
    fewer = [*at_hand.with_(replace(wanted, micro_batch=1), "trainer.micro_batch=1")] if wanted.micro_batch else []
    yield from fewer
    if wanted.global_batch is not None and not fewer:
        words = f"trainer.micro_batch=1 trainer.global_batch={size}"
        yield from at_hand.with_(replace(wanted, global_batch=size, micro_batch=1), words, _BATCH)


def _of_the_optimizer(wanted: Wanted, at_hand: _AtHand, optimizers: Mapping[str, float]) -> Iterator[_Possible]:
    spec = wanted.facts.spec
    for name, fewer in sorted(optimizers.items(), key=lambda entry: -entry[1]):
        if fewer < spec.slots_per_parameter:
            facts = replace(wanted.facts, spec=replace(spec, slots_per_parameter=fewer))
            other = replace(wanted, facts=facts, footprints={})
            if possible := [*at_hand.with_(other, f"optimizer={name}", "it needs another rate")]:
                yield from possible
                return


def _of_the_model(wanted: Wanted, at_hand: _AtHand, again: Again, length: int | None) -> Iterator[_Possible]:
    """Those that shorten what comes and goes in a step, where that could be enough."""
    candidates = [*least(wanted, at_hand.machines, at_hand.factors)]
    if all(
        it.memory.total - it.memory.activations - it.memory.logits > at_hand.machines.memory_bytes for it in candidates
    ):
        return
    if any(it.memory.logits for it in candidates):
        yield from _again(at_hand, again, "model.loss_chunk=1024", "")
    shorter = 0 if length is None else length // 2
    while shorter >= _SHORTEST:
        if possible := [*_again(at_hand, again, f"data.length={shorter}", "shorter samples")]:
            yield from possible
            return
        shorter //= 2


def _again(at_hand: _AtHand, again: Again, words: str, remark: str) -> Iterator[_Possible]:
    try:
        wanted = again([words])
    except ConfigError:  # not of this model
        return
    yield from at_hand.with_(wanted, words, remark)


def _of_the_machines(
    wanted: Wanted, at_hand: _AtHand, clusters: Mapping[str, Cluster], price_share: float
) -> Iterator[_Possible]:
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


def _more_nodes(wanted: Wanted, at_hand: _AtHand, first: int, words: str) -> Iterator[_Possible]:
    """The fewest of 2, 4, 8 ... times as many."""
    nodes = first
    while nodes <= _MOST_NODES:
        there = _AtHand(at_hand.machines.on(nodes), at_hand.factors)
        size, batch = there.machines.size, wanted.global_batch
        uneven = batch is not None and batch % (size * (wanted.micro_batch or 1))
        batch = batch if not uneven else size * (wanted.micro_batch or 1)
        said = words.format(nodes=nodes) + (f" trainer.global_batch={batch}" if uneven else "")
        if possible := [*there.with_(replace(wanted, global_batch=batch), said, _BATCH if uneven else "")]:
            yield from possible
            return
        nodes *= 2
