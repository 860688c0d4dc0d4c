"""What each version of libfabric and NCCL's plugin wants to find in the environment: `efa_rules.csv` and its reader.

A row counts where all of its conditions hold; of several for one variable, the first. Its actions:

| action | where the variable isn't set | where it is |
|---|---|---|
| `force` | set to the first of its values | another value than these is refused |
| `only` | nothing | another value than these is refused |
| `set` | set | what somebody has set stays |
| `remove` | nothing | taken away: this value, or any where none is given |
| `keep` | nothing | stays; the row says why |
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from itertools import takewhile
from pathlib import Path

from strategies.ec2 import Machine
from strategies.errors import ConfigError

TABLE = Path(__file__).with_name("efa_rules.csv")
KEEP = "SHARDWRIGHT_KEEP_ENVIRONMENT"
"""Set to 1, nothing is taken away."""
VERSIONS = ("libfabric", "plugin", "nccl", "kernel")
"""Columns that hold conditions on a version, such as `>=1.18.0 <2`."""


class Action(Enum):
    """See the module's table."""

    force = "force"
    only = "only"
    set = "set"
    remove = "remove"
    keep = "keep"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row."""

    variable: str
    """A name, or a pattern such as `RDMAV_*`."""
    action: Action
    values: tuple[str, ...]
    when: Mapping[str, str]
    """Conditions by column; empty ones are left out."""
    why: str
    source: str

    def applies(self, machine: Machine) -> bool:
        """Whether all conditions hold; one on a version that isn't known doesn't."""
        for column, condition in self.when.items():
            found: str | None = getattr(machine, column)
            if found is None:
                return False
            if column == "instance":
                if not any(fnmatchcase(found, pattern) for pattern in condition.split("|")):
                    return False
            elif not fits(found, condition):
                return False
        return True

    def allows(self, value: str) -> bool:
        """NCCL compares names without case, and so do we."""
        return value.lower() in (each.lower() for each in self.values)


@dataclass(kw_only=True)
class Verdict:
    """What is to be done to the environment, and a line about each thing."""

    changes: dict[str, str | None] = field(default_factory=dict)
    """Variable -> value, or None: take it away."""
    said: list[str] = field(default_factory=list)


@cache
def read(path: Path = TABLE) -> tuple[Rule, ...]:
    """The rows, in order.

    Raises:
        ValueError: the table is not as it should be; our own mistake.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            Rule(
                variable=row["variable"],
                action=Action(row["action"]),
                values=tuple(filter(None, row["value"].split("|"))),
                when={column: row[column] for column in (*VERSIONS, "instance") if row[column]},
                why=row["why"],
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )


def judge(
    machine: Machine,
    given: Mapping[str, str],
    own: Mapping[str, str],
    *,
    allow_tcp: bool = False,
    rules: Sequence[Rule] | None = None,
) -> Verdict:
    """Hold an environment against the table.

    Args:
        machine: what is installed.
        given: the environment as it was found; something may have been left there by a launcher.
        own: variables that the configuration sets; meant as they are.
        allow_tcp: leave out what keeps the traffic off TCP.
        rules: the table's.

    Raises:
        ConfigError: what was set on purpose can't go with EFA.
    """
    verdict = Verdict(changes=dict(own))
    for name, value in own.items():
        if given.get(name, value) != value:
            verdict.said.append(f"{name} of the environment gives way to backend.env.{name}")
    decided: set[str] = set()
    for rule in read() if rules is None else rules:
        if not rule.applies(machine) or (allow_tcp and rule.action in (Action.force, Action.only)):
            continue
        for name in _matching(rule.variable, {**given, **own}):
            if rule.action is not Action.only and name in decided:
                continue
            if rule.action is not Action.only:
                decided.add(name)
            _apply(rule, name, given, own, verdict)
    return verdict


def _matching(pattern: str, variables: Mapping[str, str]) -> list[str]:
    return sorted(name for name in variables if fnmatchcase(name, pattern)) if "*" in pattern else [pattern]


def _apply(rule: Rule, name: str, given: Mapping[str, str], own: Mapping[str, str], verdict: Verdict) -> None:
    value = own.get(name, given.get(name))
    where = "backend.env" if name in own else "the environment"
    if rule.action in (Action.force, Action.only) and value is not None and not rule.allows(value):
        raise ConfigError(
            f"EFABackend: {name}={value} in {where}, but {rule.why}. Take it away, write "
            f"{name}={rule.values[0]}, or allow TCP (backend.allow_tcp=true)."
        )
    if rule.action in (Action.force, Action.set) and value is None:
        verdict.changes[name] = rule.values[0]
        verdict.said.append(f"{name}={rule.values[0]} is set: {rule.why}")
    elif rule.action is Action.set and value is not None and not rule.allows(value):
        verdict.said.append(f"{name}={value} stays as {where} has it, where {rule.values[0]} would be set: {rule.why}")
    elif rule.action is Action.remove and value is not None:
        _remove(rule, name, value, given, own, verdict)


def _remove(
    rule: Rule, name: str, value: str, given: Mapping[str, str], own: Mapping[str, str], verdict: Verdict
) -> None:
    if name in own and not rule.values:
        raise ConfigError(
            f"EFABackend: {name} must not be set with EFA: {rule.why}. Leave it out (backend.env.{name})."
        )
    if rule.values and not rule.allows(value):
        return  # another value than launchers write: somebody meant it
    if name in own or given.get(KEEP) == "1":
        verdict.said.append(f"{name}={value} stays because it was asked for, though {rule.why}")
        return
    stays = f"backend.env.{name}={value}" if rule.values else f"{KEEP}=1"
    verdict.changes[name] = None
    verdict.said.append(f"{name}={value} is taken away: {rule.why} ({stays} keeps it)")


def fits(version: str, condition: str) -> bool:
    """Whether `version` is in a range such as `>=1.18.0 <2`; AWS's suffix counts: 1.19.0 < 1.19.0amzn4.0 < 1.19.1."""
    for part in condition.split():
        match = re.fullmatch(r"(>=|<=|<|>|==)(\S+)", part)
        if match is None:
            raise ValueError(f"{part!r} is no condition on a version")
        mine, theirs = _numbers(version), _numbers(match[2])
        if mine is None or theirs is None:
            return False
        held = {">=": mine >= theirs, "<=": mine <= theirs, "<": mine < theirs, ">": mine > theirs}
        if not held.get(match[1], mine == theirs):
            return False
    return True


def _numbers(version: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`2.6.0amzn1.0` -> ((2, 6), (1,)); what else follows doesn't count. None: it doesn't begin with a number."""
    match = re.match(r"v?(\d+(?:\.\d+)*)(?:amzn(\d+(?:\.\d+)*))?", version)
    if match is None:
        return None
    return _without_zeros(match[1]), _without_zeros(match[2] or "")


def _without_zeros(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(".") if part]
    zeros = len(list(takewhile(lambda number: number == 0, reversed(numbers))))
    return tuple(numbers[: len(numbers) - zeros])
