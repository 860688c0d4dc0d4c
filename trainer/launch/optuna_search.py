"""A search with Optuna: it chooses what is tried next, and which jobs aren't worth going on with.

Hydra's own plugin for Optuna waits for whole batches and sees last values only, so it can't stop a job early
(docs/decisions/0015): the words are in its grammar, and Optuna is asked and told directly.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.launch.book import Entry, Objective, Standing
from trainer.launch.search import Search, job_name
from trainer.launch.space import Categorical, Continuous, Integer, Parameter, SearchSpace

if TYPE_CHECKING:
    import optuna

_COUNTABLE = 10_000
"""A space of at most so many points is used up when each was tried."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to search."""

    trials: int = 20
    sampler: str = "tpe"
    pruner: str = "median"
    prune_after: int = 0
    """Steps before which no job is stopped."""
    search_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("prune_after", 0), ("search_seed", 0)):
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if value < least:
                raise ConfigError(f"launch: {flag} {value} is below {least}. Give {least} or more ({flag}).")


class OptunaSearch(Search):
    """Asks Optuna, and tells it what came of it. What it knows is what the sweep's jobs say, so nothing is stored."""

    def __init__(self, space: SearchSpace, settings: Settings, objective: Objective, entries: Sequence[Entry]) -> None:
        """Begin, or go on after the jobs of `entries`.

        Raises:
            ConfigError: Optuna isn't installed.
        """
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "launch: --search optuna needs Optuna. pip install 'shardwright[sweep]' (--search)."
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objective, self._entries = space, objective, entries
        self._distributions = {each.key: _distribution(each) for each in space.parameters}
        self._most = settings.trials
        self._points = _points(space)
        self._chance = random.Random(settings.search_seed)  # noqa: S311 - no secret comes of it
        self._study = optuna.create_study(
            sampler=_sampler(settings, len(entries)),
            pruner=_pruner(settings),
            direction="maximize" if objective.maximize else "minimize",
        )
        self._trials: dict[str, optuna.Trial] = {}
        self._reported: dict[str, int] = {}
        for entry in entries:
            self._tell_again(entry)
        if not entries:
            self._study.enqueue_trial({each.key: _middle(each) for each in space.parameters})

    @property
    def total(self) -> int:
        return max(self._most, len(self._entries))

    def ask(self) -> Entry | None:
        from optuna.trial import TrialState

        if len(self._entries) >= self._most:
            return None
        tried = {entry.words for entry in self._entries}
        left = [point for point in self._points if self._words(point) not in tried]
        if self._points and not left:
            self._most = len(self._entries)
            return None
        trial = self._study.ask(self._distributions)
        if self._words(trial.params) in tried:  # the same job would come to the same end
            self._study.tell(trial, state=TrialState.FAIL)
            if left:
                self._study.enqueue_trial(self._chance.choice(left))
            return self.ask()
        entry = Entry(name=job_name(len(self._entries), words := self._words(trial.params)), words=words)
        self._trials[entry.name] = trial
        return entry

    def _words(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{each.key}={_written(each, values[each.key])}" for each in self._space.parameters)

    def hopeless(self, entry: Entry) -> bool:
        trial, name = self._trials[entry.name], self._objective.named(self._entries)
        reported = self._reported.get(entry.name, -1)
        new = [(step, value) for step, value in sorted(entry.curves.get(name, {}).items()) if step > reported]
        for step, value in new:
            if math.isfinite(value):
                trial.report(value, step)
            self._reported[entry.name] = step
        return bool(new) and trial.should_prune()  # by where it is now: what it has got over doesn't count

    def over(self, entry: Entry) -> None:
        if entry.standing not in (Standing.stopped, Standing.waiting):  # which go on, with the next command
            self.hopeless(entry)  # what it has said last
            self._tell(self._trials[entry.name], entry)

    def _tell(self, trial: optuna.Trial, entry: Entry) -> None:
        from optuna.trial import TrialState

        value = self._objective.value(entry, self._objective.named(self._entries))
        if entry.standing is Standing.pruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        elif entry.standing is Standing.finished and value is not None:
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _tell_again(self, entry: Entry) -> None:
        """A job of an earlier command, as if it had been asked for in this one."""
        values = {each.key: _value(each, entry.values[each.key]) for each in self._space.parameters}
        self._study.enqueue_trial(values)
        self._trials[entry.name] = self._study.ask(self._distributions)
        if entry.standing in (Standing.finished, Standing.pruned, Standing.failed):
            self.over(entry)


def _points(space: SearchSpace) -> list[dict[str, Any]]:
    """Each point of a space that has few; [] where there are many."""
    columns: list[Sequence[Any]] = []
    for each in space.parameters:
        match each:
            case Categorical():
                columns.append(each.values)
            case Integer():
                columns.append(range(each.low, each.high + 1, each.step))
            case Continuous():
                if each.step is None:
                    return []
                steps = round((each.high - each.low) / each.step)
                columns.append([_snapped(each, each.low + index * each.step) for index in range(steps + 1)])
    if math.prod(map(len, columns)) > _COUNTABLE:
        return []
    keys = [each.key for each in space.parameters]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*columns)]


def _middle(parameter: Parameter) -> float | int | str:
    """What is tried first: people choose ranges around what they take for good."""
    match parameter:
        case Categorical():
            return parameter.values[0]
        case Integer():
            middle = _between(parameter.low, parameter.high, log=parameter.log)
            return parameter.low + round((middle - parameter.low) / parameter.step) * parameter.step
        case Continuous():
            return _snapped(parameter, _between(parameter.low, parameter.high, log=parameter.log))


def _between(low: float, high: float, *, log: bool) -> float:
    return math.sqrt(low * high) if log else (low + high) / 2


def _sampler(settings: Settings, known: int) -> optuna.samplers.BaseSampler:
    """Its draws depend on how many jobs there are already: else it would begin with those it has made before."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = settings.search_seed * 1_000_003 + known
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    first = min(10, max(4, settings.trials // 4))  # by chance, before there is something to learn from
    return TPESampler(seed=seed, n_startup_trials=first, multivariate=False, constant_liar=True)


def _pruner(settings: Settings) -> optuna.pruners.BasePruner:
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if settings.pruner == "none":
        return NopPruner()
    if settings.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=settings.prune_after or "auto", reduction_factor=3)
    return MedianPruner(n_startup_trials=4, n_warmup_steps=settings.prune_after)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match parameter:
        case Continuous():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
        case Integer():
            return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
        case Categorical():
            return CategoricalDistribution(parameter.values)


def _written(parameter: Parameter, value: Any) -> str:
    if isinstance(parameter, Continuous):
        value = _snapped(parameter, value)
    return value if isinstance(value, str) else repr(value)


def _snapped(parameter: Continuous, value: float) -> float:
    """0.3, not 0.30000000000000004."""
    if parameter.step is None:
        return value
    low, step = Decimal(str(parameter.low)), Decimal(str(parameter.step))
    return float(low + round((value - parameter.low) / parameter.step) * step)


def _value(parameter: Parameter, text: str) -> float | int | str:
    match parameter:
        case Continuous():
            return float(text)
        case Integer():
            return int(text)
        case Categorical():
            return text
