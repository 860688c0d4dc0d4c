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
"""`event`: start, end, checkpoint, fell_back, continuity, straggler or rollback; `time` is ISO 8601 in UTC."""


@dataclass(frozen=True)
class Happening:
    """A line of a run's history."""

    time: str
    """As noted; "": nobody was there to note it."""
    step: int | None
    """Where in the curves it belongs; None: nowhere."""
    kind: str
    """start, resume, end, kill, failure, rollback, spread (over other devices), change (of the configuration) or
    warning."""
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


def history(events: Sequence[Event]) -> list[Happening]:
    """What happened, oldest first, with the kills that nobody could note; without the checkpoints."""
    found: list[Happening] = []
    passed_over: list[Happening] = []  # noted before their start is, but part of it
    before: Event | None = None
    ended = True
    for event in events:
        time, step, text = str(event.get("time", "")), _step(event, "step"), str(event.get("text", ""))
        match event["event"]:
            case "start":
                seen = _step(event, "last_seen_step")
                if not ended:
                    found.append(Happening("", seen, "kill", f"killed: no end was noted; the last step seen is {seen}"))
                found += passed_over
                found += _started(before, event)
                before, ended, passed_over = event, False, []
            case "end":
                outcome, ended = event.get("outcome", "ended"), True
                kind = "failure" if outcome == "failed" else "end"
                found.append(Happening(time, step, kind, f"{outcome}: {event.get('reason', '')}"))
            case "rollback":
                came_to = _step(event, "last_seen_step")
                found.append(Happening(time, step, "rollback", f"rolled back from step {came_to} to {step}"))
            case "fell_back" | "continuity" | "straggler":
                (found if step is not None else passed_over).append(Happening(time, step, "warning", text))
    return found + passed_over


def spread(start: Event) -> str:
    """How a start was spread: `ddp, 2 x cuda`."""
    return f"{start.get('strategy') or '?'}, {start.get('world_size', '?')} x {start.get('device', '?')}"


def has_ended(events: Sequence[Event]) -> bool:
    """Whether the newest start noted its end; False: it goes on, or was killed."""
    edges = [event["event"] for event in events if event["event"] in ("start", "end")]
    return edges[-1:] == ["end"]


def _started(before: Event | None, event: Event) -> Iterator[Happening]:
    time, step = str(event.get("time", "")), _step(event, "step")
    fresh = before is None and not step
    where = f" on {event['host']}" if event.get("host") else ""
    checkpoint = f", from {event['checkpoint']}" if event.get("checkpoint") else ""
    restarts = f", restart {event['restarts']} by the launcher" if event.get("restarts") else ""
    text = f"{'started' if fresh else 'started again'}: {spread(event)}{where}{checkpoint}{restarts}"
    yield Happening(time, step, "start" if fresh else "resume", text)
    if before is not None and (difference := _changed(before, event)):
        yield Happening(time, step, "spread", difference)
    changes = event.get("changes")
    for change in changes if isinstance(changes, list) else []:
        yield Happening(time, step, "change", str(change))


def _changed(before: Event, after: Event) -> str:
    """What is different in how two starts are spread: `ddp → fsdp_full, 2 → 4 ranks`; "" if nothing is."""
    found = [
        f"{before.get(key) or '?'} → {after.get(key) or '?'}{unit}"
        for key, unit in (("strategy", ""), ("world_size", " ranks"), ("device", ""))
        if before.get(key) != after.get(key)
    ]
    return ", ".join(found)


def _step(event: Event, key: str) -> int | None:
    value = event.get(key)
    return value if isinstance(value, int) else None
