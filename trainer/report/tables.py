"""The tables of the page: rows of text, one column per run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trainer.metrics.events import Happening, has_ended, spread
from trainer.metrics.summary import summary_rows
from trainer.metrics.text import byte_size, duration
from trainer.report.runs import Run

_NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """A name, and what each run has for it."""

    name: str
    values: Sequence[str]
    chosen: bool = False
    """Set on the command line of a run."""

    @property
    def differs(self) -> bool:
        """Whether the runs don't agree."""
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written."""

    step: str
    time: str
    seconds: str
    stall: str
    size: str


def summary_table(runs: Sequence[Run]) -> list[Row]:
    """How each run went."""
    return _side_by_side([dict(_summary(run)) for run in runs])


def config_table(runs: Sequence[Run]) -> list[Row]:
    """Each leaf of the configurations."""
    chosen = [key for run in runs for key in _chosen(run)]
    rows = _side_by_side([run.config for run in runs])
    return [
        Row(row.name, row.values, any(row.name == key or row.name.startswith(f"{key}.") for key in chosen))
        for row in rows
    ]


def environment_table(runs: Sequence[Run]) -> list[Row]:
    """Versions and machines."""
    return _side_by_side([{**run.environment, "command": " ".join(run.command)} for run in runs])


def checkpoints(run: Run) -> list[Saved]:
    """The checkpoints that were written, newest first."""
    found = [event for event in run.events if event["event"] == "checkpoint"]
    return [
        Saved(
            step=whole(event.get("step")),
            time=when(event.get("time")),
            seconds=_seconds(event.get("seconds")),
            stall=_seconds(event.get("stall_s")),
            size=_size(event.get("bytes")),
        )
        for event in reversed(found)
    ]


def warnings(run: Run) -> list[Happening]:
    """What a reader must not miss."""
    found = [each for each in run.history if each.kind in ("kill", "failure", "warning")]
    steps = run.not_finite()
    if steps:
        text = f"loss or gradient norm not finite at {len(steps):,} logged step(s), first at {steps[0]:,}"
        found.append(Happening("", steps[0], "warning", text))
    return found


def when(time: Any) -> str:
    """`2026-11-21 06:18:53`, in UTC, from ISO 8601; as it is where it's something else."""
    try:
        return datetime.fromisoformat(str(time)).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return str(time)


def _summary(run: Run) -> Iterator[tuple[str, str]]:
    yield "state", run.state()
    if run.summary is not None:
        try:
            rows = summary_rows(run.summary)
            yield from rows[1:] if has_ended(run.events) else rows  # the first is how it ended
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            yield "summary.json", f"unreadable ({type(error).__name__})"
    if run.since_summary():
        yield "newest", run.newest()
    starts = [event for event in run.events if event["event"] == "start"]
    if starts:
        yield "spread", spread(starts[-1])
        num_kills = sum(each.kind == "kill" for each in run.history)
        num_failures = sum(each.kind == "failure" for each in run.history)
        yield "starts", f"{len(starts)} ({num_kills} killed, {num_failures} failed)"
    saved = [event for event in run.events if event["event"] == "checkpoint"]
    if saved:
        stalls = sum(event["stall_s"] for event in saved if isinstance(event.get("stall_s"), float | int))
        yield "checkpoints", f"{len(saved):,} written, training waited {stalls:.1f} s for them"


def _chosen(run: Run) -> Iterator[str]:
    for word in run.command:
        key, separator, _ = word.partition("=")
        if separator:
            yield key.lstrip("+~")


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[Row]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [column.get(name, _NOTHING) for column in columns]) for name in names]


def whole(value: Any) -> str:
    """With commas between thousands."""
    return f"{value:,}" if isinstance(value, int) else _NOTHING


def _seconds(value: Any) -> str:
    if not isinstance(value, float | int):
        return _NOTHING
    return f"{value:.2f} s" if value < 60 else duration(value)


def _size(value: Any) -> str:
    return byte_size(value) if isinstance(value, float | int) else _NOTHING
