"""What the doctor has to say: one line for each thing that was looked at, on all hosts that have it alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

_SHOWN = 4


class Level(Enum):
    """How bad it is."""

    ok = "ok"
    warning = "warning"
    failure = "failure"

    @property
    def weight(self) -> int:
        """Grows with how bad it is."""
        return list(Level).index(self)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found."""

    check: str
    level: Level
    what: str
    """With the values."""
    where: tuple[str, ...] = ()
    """Hosts or ranks that it is about; empty: all."""
    advice: str = ""
    """What to do."""

    def as_json(self) -> dict[str, Any]:
        """For `doctor.json`."""
        return {
            "check": self.check,
            "level": self.level.value,
            "where": list(self.where),
            "what": self.what,
            "advice": self.advice,
        }

    def line(self) -> str:
        """For a log, or an error."""
        at = f" on {listed(self.where)}" if self.where else ""
        return f"{self.check}{at}: {self.what}.{f' {self.advice}.' if self.advice else ''}"


def worst(findings: Iterable[Finding]) -> Level:
    """Of all; `ok` where there are none."""
    return max((finding.level for finding in findings), key=lambda level: level.weight, default=Level.ok)


def listed(names: Sequence[object]) -> str:
    """`a, b, c, d and 5 more`."""
    shown = ", ".join(map(str, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def plural(number: int, word: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def together(found: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """What was found on each host: one finding for all hosts of which the same is to be said.

    Numbers differ a little from host to host where all is well, and where something is wrong with the same advice;
    so hosts belong together if check, level and advice are equal, and the text names the first few.
    """
    groups: dict[tuple[str, Level, str], dict[str, list[Finding]]] = {}
    for host, findings in found.items():
        for each in findings:
            groups.setdefault((each.check, each.level, each.advice), {}).setdefault(host, []).append(each)
    return [_merged(by_host, len(found)) for by_host in groups.values()]


def _merged(by_host: Mapping[str, Sequence[Finding]], num_hosts: int) -> Finding:
    texts = {host: "; ".join(dict.fromkeys(each.what for each in findings)) for host, findings in by_host.items()}
    some = next(iter(by_host.values()))[0]
    everywhere = len(by_host) == num_hosts
    where = () if everywhere else tuple(by_host)
    if len(set(texts.values())) == 1:
        return replace(some, what=next(iter(texts.values())), where=where)
    if some.level is Level.ok:
        host, text = next(iter(texts.items()))
        return replace(some, what=f"{text} ({host}; {len(texts) - 1} more alike)", where=where)
    return replace(some, what=listed([f"{host}: {text}" for host, text in texts.items()]), where=where)
