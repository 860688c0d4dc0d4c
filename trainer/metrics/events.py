"""`events.jsonl`: what happened to a run besides its steps, one JSON object per event, and what follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.metrics.jsonl import objects

EVENTS = "events.jsonl"

Event = Mapping[str, Any]
"""`event` says its kind: start, end, checkpoint, fell_back, continuity or rollback; `time` is ISO 8601 in UTC."""


@dataclass(frozen=True)
class Mark:
    """A place in the curves of a run where something happened to it."""

    step: int
    kind: str
    """resume, kill, failure, change, warning or rollback."""
    text: str


def note(folder: Path, event: str, **entries: Any) -> None:
    """Add an event of the run in `folder`.

    Raises:
        OSError: the file can't be written.
    """
    line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **entries}
    with (folder / EVENTS).open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"  # by a crash; what comes now must not be lost with it
        else:
            torn = False
        file.write(b"\n" * torn + json.dumps(line, default=str).encode() + b"\n")


def read_events(folder: Path) -> list[Event]:
    """The events of the run in `folder`, oldest first; [] if there are none."""
    return [line for line in objects(folder / EVENTS) if isinstance(line.get("event"), str)]


def marks(events: Sequence[Event]) -> list[Mark]:
    """What to mark in the curves, in the order in which it happened."""
    return list(_marks(events))


def has_ended(events: Sequence[Event]) -> bool:
    """Whether the newest start noted its end; False: it goes on, or was killed."""
    edges = [event["event"] for event in events if event["event"] in ("start", "end")]
    return edges[-1:] == ["end"]


def _marks(events: Sequence[Event]) -> Iterator[Mark]:
    before: Event | None = None
    ended = True
    for event in events:
        step = _step(event)
        match event["event"]:
            case "start":
                if not ended:
                    seen = _step(event, "last_seen_step")
                    yield Mark(seen, "kill", f"killed after step {seen:,}")
                if before is not None or step > 0:
                    yield Mark(step, "resume", f"resumed from step {step:,}")
                if before is not None and (text := changed(before, event)):
                    yield Mark(step, "change", text)
                before, ended = event, False
            case "end":
                ended = True
                if event.get("outcome") == "failed":
                    yield Mark(step, "failure", f"failed: {event.get('reason', '')}")
            case "rollback":
                yield Mark(step, "rollback", f"rolled back to step {step:,}")
            case "continuity":
                yield Mark(step, "warning", str(event.get("text", "")))


def changed(before: Event, after: Event) -> str:
    """What is different in how two starts are spread: `ddp → fsdp_full, 2 → 4 ranks`; "" if nothing is."""
    found = [
        f"{before.get(key, '?')} → {after.get(key, '?')}{unit}"
        for key, unit in (("strategy", ""), ("world_size", " ranks"), ("device", ""))
        if before.get(key) != after.get(key)
    ]
    return ", ".join(found)


def _step(event: Event, key: str = "step") -> int:
    value = event.get(key)
    return value if isinstance(value, int) else 0
