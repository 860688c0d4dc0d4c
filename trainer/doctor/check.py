"""What a check is: a look at one host, and what is to be thought of it."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trainer.doctor.findings import Finding, Level, listed, together


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a look at a host needs to know."""

    host: str
    hosts: tuple[str, ...]
    """The names of all, as they call themselves."""
    ranks_here: int = 1
    threads: int = 1
    """Of each rank here."""
    folders: tuple[Path, ...] = ()
    """Where the job will write."""
    instance_type: str | None = None
    """As EC2 calls it; None: not known."""
    meeting: tuple[str, int] | None = None
    """Address and port of the ranks' store."""
    interface: str | None = None
    """As the configuration chooses it."""
    quick: bool = False


class Check(ABC):
    """One thing to look at on each host."""

    name: ClassVar[str]
    limit_s: ClassVar[float] = 20.0
    """A look that takes longer is a finding in itself: a network disk that doesn't answer, say."""

    @abstractmethod
    def look(self, asked: Asked) -> Any:
        """At this host; a JSON value."""

    @abstractmethod
    def judge(self, found: Any) -> list[Finding]:
        """What `look` found on one host."""

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        """What `look` found on several, by their names."""
        return []

    def ok(self, what: str) -> Finding:
        """All is well."""
        return Finding(check=self.name, level=Level.ok, what=what)

    def warning(self, what: str, advice: str = "", where: Sequence[str] = ()) -> Finding:
        """Worth knowing."""
        return Finding(check=self.name, level=Level.warning, what=what, advice=advice, where=tuple(where))

    def failure(self, what: str, advice: str = "", where: Sequence[str] = ()) -> Finding:
        """A job will fail or crawl."""
        return Finding(check=self.name, level=Level.failure, what=what, advice=advice, where=tuple(where))


def look(checks: Sequence[Check], asked: Asked) -> dict[str, Any]:
    """Every check's look at this host, all at once; whatever goes wrong in one is that one's answer."""
    answers: dict[str, Any] = {}

    def run(check: Check) -> None:
        try:
            answers[check.name] = {"found": check.look(asked)}
        except Exception as error:
            answers[check.name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    begun = time.monotonic()
    threads = [threading.Thread(target=run, args=[check], daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    for check, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, begun + check.limit_s - time.monotonic()))
    return {
        check.name: answers.get(check.name, {"error": f"no answer within {check.limit_s:.0f} s"}) for check in checks
    }


def judge(checks: Sequence[Check], hosts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What is to be thought of what `look` has found on each host."""
    findings: list[Finding] = []
    for check in checks:
        found = {host: looks[check.name]["found"] for host, looks in hosts.items() if "found" in looks[check.name]}
        each: dict[str, list[Finding]] = {}
        for host, looks in hosts.items():
            if "error" in looks[check.name]:
                each[host] = [_not_seen(check, looks[check.name]["error"])]
            else:
                each[host] = check.judge(found[host])
        findings += together(each)
        if len(found) > 1:
            findings += check.compare(found)
    return findings


def _not_seen(check: Check, error: str) -> Finding:
    silent = error.startswith("no answer")
    return Finding(
        check=check.name,
        level=Level.failure if silent else Level.warning,
        what=f"could not be looked at: {error}",
        advice="Something there hangs: try it by hand" if silent else "",
    )


def text_of(path: str | Path) -> str | None:
    """A small file's words; None: it isn't there, or may not be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text().strip()
    return None


def differing(values: Mapping[str, Any]) -> str | None:
    """`3 on a, b; 4 on c`: which hosts have what, the rarest first; None: all have the same."""
    groups: dict[str, list[str]] = {}
    for host, value in values.items():
        groups.setdefault("none" if value is None else str(value), []).append(host)
    if len(groups) < 2:
        return None
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{value} on {listed(hosts)}" for value, hosts in ordered)
