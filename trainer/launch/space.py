"""What a sweep varies, read from words in Hydra's grammar: `key=a,b`, `key=range(1,5)`, `key=interval(0,1)`."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from strategies.errors import ConfigError
from trainer.complaints import CONF, explained


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Any number from `low` to `high`, both included."""

    key: str
    low: float
    high: float
    log: bool = False
    """Each order of magnitude counts the same."""
    step: float | None = None
    """Only `low` plus multiples of it; None: any."""


@dataclass(frozen=True, kw_only=True)
class Integer:
    """A whole number from `low` to `high`, both included."""

    key: str
    low: int
    high: int
    log: bool = False
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """One of several values."""

    key: str
    values: tuple[str, ...]
    """As they stand behind the `=` of a word."""


Parameter: TypeAlias = Continuous | Integer | Categorical


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The words of a sweep, taken apart."""

    parameters: tuple[Parameter, ...]
    fixed: tuple[str, ...]
    """The words that are the same for every job, as they were given."""


def search_space(words: Sequence[str]) -> SearchSpace:
    """The ranges that `words` describe.

    `key=a,b` and `choice(a,b)` are one of these; `range(1,5)` is a whole number from 1 to 4, `range(0,1,0.25)` one of
    four; `interval(1e-4,1e-1)` any number in between, `int(interval(1,64))` a whole one; `tag(log,...)` around these
    counts each order of magnitude the same.

    Raises:
        ConfigError: a word can't be read, or holds no value, or is one that a sweep sets itself.
    """
    fixed, swept = _taken_apart(words)
    return SearchSpace(parameters=tuple(_parameter(each) for each in swept), fixed=tuple(fixed))


def combinations(words: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The words that all jobs share, and for each combination of the others' values the words that make it.

    Raises:
        ConfigError: as `search_space`; or a range holds infinitely many values, or a value comes twice.
    """
    fixed, swept = _taken_apart(words)
    for each in swept:
        _values(each)
    return fixed, [tuple(job) for job in BasicSweeper.split_arguments(swept, None)[0]]


def edges(space: SearchSpace) -> list[tuple[str, ...]]:
    """Few combinations in which each parameter has its lowest and its highest value, or each of its values."""
    columns = [[f"{each.key}={value}" for value in _ends(each)] for each in space.parameters]
    rows = itertools.zip_longest(*columns)
    return [tuple(word or column[0] for word, column in zip(row, columns, strict=True)) for row in rows]


def _ends(parameter: Parameter) -> list[str]:
    if isinstance(parameter, Categorical):
        return list(parameter.values)
    return [repr(parameter.low), repr(parameter.high)]


def _taken_apart(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The words with one value, and what the others mean."""
    fixed, swept = [], []
    for word in words:
        key = word.partition("=")[0]
        if word.startswith("-"):
            raise ConfigError(f"launch: {word} doesn't go with --multirun. Leave it out; --help lists the options.")
        if re.match(r"[+~]*(hydra[./]|run\.(dir|name)$)", key):
            raise ConfigError(
                f"launch: {word!r} doesn't go with --multirun, which gives each job a folder of its own. Say where "
                f"with --sweep-dir ({key})."
            )
    with _loader(words) as loader:
        parser = OverridesParser.create(config_loader=loader)
        for word in words:
            try:
                override = parser.parse_overrides([word])[0]
            except HydraException as error:
                raise explained(error, [word]) from error
            if override.is_sweep_override():
                swept.append(override)
            else:
                fixed.append(word)
    keys = [word.partition("=")[0] for word in words]
    for override in swept:
        if keys.count(key := override.get_key_element()) > 1:
            raise ConfigError(f"launch: {key} varies and is given twice. Leave one of the words out ({key}).")
    return fixed, swept


@contextlib.contextmanager
def _loader(words: Sequence[str]) -> Iterator[Any]:
    """What knows the choices of groups; only `glob(...)` asks it."""
    if not any("glob(" in word for word in words):
        yield None
        return
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _values(override: Override) -> list[str]:
    """Each value once, as it stands in a word."""
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"launch: {override.input_line!r} holds more values than can be tried. Name some, as in "
            f"{override.get_key_element()}=1e-3,1e-2, or search with --search optuna ({override.key_or_group})."
        )
    try:
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError):  # a range whose step is 0
        values = []
    if not values:
        raise ConfigError(
            f"launch: {override.input_line!r} holds no value. A range ends before its second number, as in "
            f"{override.get_key_element()}=range(1,5) for 1 to 4, or range(0,1,0.25) ({override.key_or_group})."
        )
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ConfigError(
            f"launch: {override.input_line!r} holds {', '.join(twice)} twice, which would be the same job. Name each "
            f"value once ({override.key_or_group})."
        )
    return values


def _parameter(override: Override) -> Parameter:
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return _interval(override, key, value)
    values = _values(override)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _range(override, key, value)
    return Categorical(key=key, values=tuple(values))


def _interval(override: Override, key: str, value: IntervalSweep) -> Parameter:
    assert value.start is not None
    assert value.end is not None
    log = _log(override, value.tags)
    if not value.start < value.end or (log and value.start <= 0):
        least = " and above 0" if log else ""
        raise ConfigError(
            f"launch: {override.input_line!r} is no interval. Give a lower end{least}, then a higher one "
            f"({override.key_or_group})."
        )
    if isinstance(value.start, int) and isinstance(value.end, int):
        return Integer(key=key, low=value.start, high=value.end, log=log)
    return Continuous(key=key, low=float(value.start), high=float(value.end), log=log)


def _range(override: Override, key: str, value: RangeSweep) -> Parameter:
    values = sorted(value.range())
    log = _log(override, value.tags)
    if log and (values[0] <= 0 or value.step != 1):
        raise ConfigError(
            f"launch: {override.input_line!r} can't be taken by orders of magnitude. Start above 0 with step 1, or "
            f"write tag(log,interval(...)) ({override.key_or_group})."
        )
    if all(isinstance(each, int) for each in values):
        return Integer(key=key, low=int(values[0]), high=int(values[-1]), log=log, step=abs(int(value.step)))
    low, high = (float(f"{end:.12g}") for end in (values[0], values[-1]))  # 0.3, not 0.30000000000000004
    return Continuous(key=key, low=low, high=high, log=log, step=abs(float(value.step)))


def _log(override: Override, tags: set[str]) -> bool:
    if unknown := tags - {"log"}:
        raise ConfigError(
            f"launch: {override.input_line!r} has the tag {', '.join(sorted(unknown))}, which means nothing here. "
            f"Write tag(log,...), or no tag ({override.key_or_group})."
        )
    return "log" in tags
