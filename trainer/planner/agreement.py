"""Predicted collectives held against those that a step really starts, as rank 0 of ranks that aren't there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from strategies.base import Collective, Plan, Strategy, WorldSpec
from strategies.errors import ConfigError
from trainer.planner.facts import ModelFacts
from trainer.planner.search import Candidate, WithoutMachines
from trainer.planner.simulate import gradient_order, simulated

AnyCandidate = TypeVar("AnyCandidate", Candidate, WithoutMachines)

_MOST_MICRO_BATCHES = 2
"""Of a step: the third sends what the second did."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """All calls of one kind, on equally many ranks, in one part of a step."""

    kind: str
    phase: str
    ranks: int
    predicted: tuple[int, int]
    """Calls, and bytes of all of them."""
    simulated: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one strategy on one number of ranks."""

    strategy: str
    world: WorldSpec
    micro_batches: int
    """Of the step that was taken."""
    of: int
    """Micro-batches of the planned step."""
    predicted: tuple[Collective, ...]
    simulated: tuple[Collective, ...]

    @property
    def holds(self) -> bool:
        """Each call was predicted with its bytes, group and phase."""
        return set(self.predicted) == set(self.simulated)

    def lines(self) -> list[Line]:
        """Calls and bytes by kind, phase and ranks."""
        both = [(it.kind, it.phase, it.ranks) for it in (*self.predicted, *self.simulated)]
        return [
            Line(
                kind=kind, phase=phase, ranks=ranks, predicted=_sum(self.predicted, kind, phase, ranks),
                simulated=_sum(self.simulated, kind, phase, ranks),
            )
            for kind, phase, ranks in dict.fromkeys(both)
        ]  # fmt: skip


def _sum(collectives: Iterable[Collective], kind: str, phase: str, ranks: int) -> tuple[int, int]:
    alike = [it for it in collectives if (it.kind, it.phase, it.ranks) == (kind, phase, ranks)]
    return sum(it.count for it in alike), sum(it.count * it.payload_bytes for it in alike)


def first_that_can(candidates: Sequence[AnyCandidate]) -> AnyCandidate:
    """The best of those whose steps can be run without their ranks.

    Args:
        candidates: best first.

    Raises:
        ConfigError: none can.
    """
    found = next((it for it in candidates if it.spread.can_simulate), None)
    if found is None:
        names = ", ".join(dict.fromkeys(it.name for it in candidates))
        raise ConfigError(
            f"plan: no step of {names} can be taken without its ranks, for which its library asks. Simulate ddp or an "
            "fsdp strategy (--simulate, strategy)."
        )
    return found


def agreement(facts: ModelFacts, words: str, strategy: Strategy, world: WorldSpec, plan: Plan) -> Agreement:
    """Take a step, and predict the same one. Takes about a quarter of a second of one core for each block of the model,
    and memory for none of its weights.

    Args:
        facts: of the model.
        words: that choose the strategy.
        strategy: not connected.
        world: the ranks that aren't there.
        plan: of a step, of which no more than two micro-batches are taken, of one sample.

    Raises:
        ConfigError: the strategy's steps can't be taken without its ranks.
    """
    if plan.cast_weights:
        raise ConfigError(
            "plan: --simulate takes the steps of our own strategies, which cast no weights. Leave --cast out."
        )
    short = replace(plan, micro_batch=1, accumulation=min(plan.accumulation, _MOST_MICRO_BATCHES))
    batch = facts.batch(1)
    order = gradient_order(lambda: copy.deepcopy(facts.module), batch, facts.loss, plan.precision)
    spec = replace(facts.spec, gradient_order=order)
    predicted = strategy.footprint(spec, world, short).collectives
    seen = simulated(strategy, lambda: copy.deepcopy(facts.module), batch, facts.loss, world, short)
    return Agreement(
        strategy=words,
        world=world,
        micro_batches=short.accumulation,
        of=plan.accumulation,
        predicted=predicted,
        simulated=seen,
    )
