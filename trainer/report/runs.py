"""What a run's folder says of the run, however much of it there is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics.events import EVENTS, Event, Happening, has_ended, history, read_events
from trainer.metrics.jsonl import Line, read
from trainer.metrics.text import compact, short

_SIGNS = ("metrics.jsonl", EVENTS, "config.yaml")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, as far as it has come."""

    name: str
    folder: Path
    lines: Sequence[Line]
    events: Sequence[Event]
    history: Sequence[Happening]
    summary: Mapping[str, Any] | None
    """Of the last start that came to an end; None: none did."""
    config: Mapping[str, str]
    """Each leaf of the resolved configuration, as text."""
    environment: Mapping[str, str]
    """Of the newest start."""
    command: Sequence[str]

    def state(self) -> str:
        """How the newest start ended, if it did."""
        edges = [event for event in self.events if event["event"] in ("start", "end")]
        if not edges:
            return "no start noted"
        if not has_ended(self.events):
            return "no end noted: still going, or killed"
        return f"{edges[-1].get('outcome', 'ended')}: {edges[-1].get('reason', '')}"

    def newest(self) -> str:
        """The newest number of each kind that people ask for; "" before the first line."""
        found: dict[str, Any] = {}
        for line in self.lines:
            found |= line
        shown: dict[str, Callable[[float], str]] = {
            "loss": short, "val_loss": short, "tokens": compact, "tokens_per_s": compact,
        }  # fmt: skip
        known = [key for key in shown if isinstance(found.get(key), float | int)]
        numbers = [f"{key} {shown[key](found[key])}" for key in known]
        return ", ".join([f"step {found['step']:,}", *numbers]) if found else ""

    def since_summary(self) -> str:
        """What came after the summary was written, in one line; "" if nothing did."""
        if not self.lines or (self.summary is not None and self.lines[-1]["step"] <= self.summary.get("step", 0)):
            return ""
        return f"{'not ended yet, or killed' if self.summary is None else 'went on since'}: {self.newest()}"

    def not_finite(self) -> list[int]:
        """The logged steps at which the loss or the gradient norm wasn't a finite number."""
        return [
            line["step"]
            for line in self.lines
            if any(isinstance(line.get(key), float) and not math.isfinite(line[key]) for key in ("loss", "grad_norm"))
        ]


def is_run(folder: Path) -> bool:
    """Whether a run was started in `folder`, even if it came to nothing."""
    return any((folder / name).is_file() for name in _SIGNS)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read the run in `folder`; what is missing or torn is left out.

    Args:
        folder: the run's.
        name: what to call it; None: as its folder is called.
    """
    events = read_events(folder)
    environment = _object(folder / "environment.json")
    command = environment.pop("command", None)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        lines=read(folder / "metrics.jsonl"),
        events=events,
        history=history(events),
        summary=_object(folder / "summary.json") or None,
        config=dict(_leaves(_yaml(folder / "config.yaml"))),
        environment=dict(_leaves(environment)),
        command=[str(word) for word in command] if isinstance(command, list) else [],
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, tree if isinstance(tree, str) else json.dumps(tree, default=str)
