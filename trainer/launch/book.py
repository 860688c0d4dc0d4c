"""What is known of a sweep's jobs, kept in `sweep.json` so that the same command goes on."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from strategies.errors import ConfigError

_MOST_POINTS = 256


class Standing(Enum):
    """Where a job of a sweep stands."""

    waiting = "waiting"
    running = "running"
    """Was started, and nobody has seen its end."""
    finished = "finished"
    stopped = "stopped"
    """With a checkpoint; the same command goes on."""
    failed = "failed"
    pruned = "pruned"
    """Stopped since others did better."""


@dataclass(kw_only=True)
class Entry:
    """One job of a sweep."""

    name: str
    """Of the job and of its folder."""
    words: tuple[str, ...]
    """What is different from the others."""
    standing: Standing = Standing.waiting
    detail: str = ""
    """Why it failed."""
    handle: str | None = None
    """What the launcher finds it by; None: it was never started."""
    begun: float = 0.0
    """When its newest start was, in seconds since 1970."""
    before_s: float = 0.0
    """What its earlier starts took."""
    seconds: float = 0.0
    """What all of them took."""
    pruning: bool = False
    """It was asked to stop since others did better."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of what the jobs may be compared by: name -> step -> value."""

    @property
    def values(self) -> dict[str, str]:
        """Key -> value of what is different from the others."""
        return dict(word.split("=", 1) for word in self.words)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the jobs are compared by."""

    name: str | None = None
    """None: `val_loss` where a job has one, else `loss`."""
    maximize: bool = False

    def candidates(self) -> tuple[str, ...]:
        """The names that it may turn out to be."""
        return ("val_loss", "loss") if self.name is None else (self.name,)

    def named(self, entries: Iterable[Entry]) -> str:
        """The name that it is, for these jobs."""
        known = {name for entry in entries for name in entry.metrics}
        return next((name for name in self.candidates() if name in known), self.candidates()[-1])

    def value(self, entry: Entry, name: str) -> float | None:
        """The newest value; None: there is none, or it isn't a finite number."""
        value = entry.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None

    def ranked(self, entries: Iterable[Entry]) -> list[Entry]:
        """The best finished one first; then those that came less far, each kind by the objective too."""
        entries = list(entries)
        name = self.named(entries)

        def place(entry: Entry) -> tuple[int, float]:
            value = self.value(entry, name)
            order = _ORDER.index(entry.standing)
            return order, math.inf if value is None else -value if self.maximize else value

        return sorted(entries, key=place)


_ORDER = (Standing.finished, Standing.running, Standing.stopped, Standing.pruned, Standing.failed, Standing.waiting)


class Book:
    """The jobs of the sweep in a folder, held by this process alone until `close`."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Open it, or begin.

        Args:
            folder: of the sweep.
            about: what all of its jobs share; another start must say the same.

        Raises:
            ConfigError: the folder can't be written, another sweep runs there, or it holds jobs that share
                something else.
        """
        self.folder = folder
        self._path, self._written = folder / "sweep.json", ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            self._lock.acquire(timeout=0)
        except OSError as error:
            if not isinstance(error, Timeout):
                raise ConfigError(
                    f"launch: the folder {folder} can't be written: {error.strerror}. Choose another (--sweep-dir)."
                ) from error
            raise ConfigError(
                f"launch: another process runs the sweep in {folder}. Wait for it, or choose another folder "
                "(--sweep-dir)."
            ) from None
        try:
            found = self._read()
            self._refuse_another(found.get("about", about), about)
            self.about = dict(about)
            self.entries = [_entry(line) for line in found.get("jobs", [])]
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(
                f"launch: {self._path} can't be read: {error}. Choose another folder (--sweep-dir)."
            ) from error
        return found

    def _refuse_another(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"launch: {self.folder} holds a sweep with another {key}: {_short(before.get(key))}, not "
                    f"{_short(now.get(key))}. Choose another folder (--sweep-dir)."
                )

    def save(self) -> None:
        """Write down how things stand, if that has changed; at every moment the file is whole."""
        text = json.dumps({"about": self.about, "jobs": [_line(entry) for entry in self.entries]}, indent=1)
        if text == self._written:
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._written = text

    def close(self) -> None:
        """Let go of the folder, of which nothing stays where nothing was written down; may be called twice."""
        if not self._path.exists():
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                self.folder.rmdir()
        self._lock.release()


def thinned(curve: Mapping[int, float]) -> dict[int, float]:
    """At most 256 points and the last: every second, fourth, eighth ..., so that curves of one kind keep one grid."""
    stride = 1
    while len(curve) > _MOST_POINTS * stride:
        stride *= 2
    last = len(curve) - 1
    return {step: value for index, (step, value) in enumerate(curve.items()) if index % stride == 0 or index == last}


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return repr(text if len(text) < 200 else f"{text[:200]}...")


def _line(entry: Entry) -> dict[str, Any]:
    line = asdict(entry) | {"standing": entry.standing.value, "seconds": round(entry.seconds, 1)}
    line["metrics"] = {name: _plain(value) for name, value in entry.metrics.items()}
    line["curves"] = {
        name: [[step, _plain(value)] for step, value in thinned(curve).items()] for name, curve in entry.curves.items()
    }
    return line


def _entry(line: Mapping[str, Any]) -> Entry:
    read = {
        "words": tuple(line["words"]),
        "standing": Standing(line["standing"]),
        "metrics": {name: _number(value) for name, value in line["metrics"].items()},
        "curves": {name: {step: _number(value) for step, value in curve} for name, curve in line["curves"].items()},
    }
    return Entry(**{**line, **read})


def _number(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value


def _plain(value: float) -> float | str:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else str(value)
