"""Showing a sweep while it goes: a live table, or a line for each change where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.launch.book import Entry, Objective, Standing
from trainer.launch.search import readable
from trainer.metrics.text import duration, short

_STYLES = {
    Standing.waiting: "dim",
    Standing.running: "cyan",
    Standing.finished: "green",
    Standing.stopped: "yellow",
    Standing.failed: "bold red",
    Standing.pruned: "magenta",
}
_FIRST = (Standing.running, Standing.failed, Standing.finished, Standing.stopped, Standing.pruned, Standing.waiting)
_MARGIN = 8
"""Lines of the terminal that the table's head and what is around it take."""
_LEAST_ROWS = 5
_LONGEST = 60


class Board:
    """Shows the jobs' states while it is open."""

    def __init__(
        self, objective: Objective, total: Callable[[], int], console: Console, over: Sequence[Entry] = ()
    ) -> None:
        """It is opened by `with`.

        Args:
            objective: orders the jobs.
            total: jobs in all, as far as is known.
            console: where to.
            over: jobs of which there is nothing more to tell.
        """
        self._objective, self._total, self._console = objective, total, console
        self._told = {entry.name: (entry.standing, entry.pruning) for entry in over}
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, entries: Sequence[Entry]) -> None:
        """How they stand now."""
        if self._live is None:
            self._tell_changes(entries)
            return
        most = max(_LEAST_ROWS, self._console.size.height - _MARGIN)
        self._live.update(self._table(entries, most), refresh=True)

    def say(self, text: str) -> None:
        """A line for people, above the table."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _table(self, entries: Sequence[Entry], most: int) -> Table:
        known = {entry.name: place for place, entry in enumerate(self._objective.ranked(entries))}
        rows = sorted(entries, key=lambda entry: (_FIRST.index(entry.standing), known[entry.name]))
        hidden = len(rows) - most
        counted = ", ".join(
            f"{sum(entry.standing is each for entry in entries)} {each.value}"
            for each in Standing
            if any(entry.standing is each for entry in entries)
        )
        caption = f"{counted} of {self._total()}" + (f"; {hidden} not shown" if hidden > 0 else "")
        return table(rows[:most], self._objective.named(entries), caption)

    def _tell_changes(self, entries: Sequence[Entry]) -> None:
        name = self._objective.named(entries)
        for entry in entries:
            now = (entry.standing, entry.pruning)
            if self._told.get(entry.name, (Standing.waiting, False)) == now:
                continue
            self._told[entry.name] = now
            if entry.standing is Standing.running and entry.pruning:
                state = "is asked to stop, since others do better"
            else:
                state = entry.standing.value
            numbers = _numbers(entry, name) if entry.standing is not Standing.running else []
            after = [f"{key} {value}" for key, value in numbers] + ([entry.detail] if entry.detail else [])
            self.say(", ".join([f"{entry.name} ({' '.join(entry.words)}): {state}", *after]))


def table(entries: Sequence[Entry], objective: str, caption: str = "") -> Table:
    """One row for each job, with what makes it different and the newest numbers."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry.values))
    names = list(dict.fromkeys([objective, "loss", "val_loss"]))
    names = [name for name in names if name == objective or any(name in entry.metrics for entry in entries)]
    found = Table(caption=caption, caption_justify="left", pad_edge=False)
    found.add_column("job", no_wrap=True)
    for key in keys:
        found.add_column(key.rpartition(".")[2], overflow="fold")
    found.add_column("state", no_wrap=True)
    for name in ("step", *names, "time"):
        found.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        values = [Text(_cut(readable(entry.values.get(key, "")))) for key in keys]
        numbers = dict(_numbers(entry, *names))
        cells: list[str | Text] = [
            entry.name.partition("-")[0],
            *values,
            Text(entry.standing.value, _STYLES[entry.standing]),
        ]
        cells += [numbers.get(name, "") for name in ("step", *names, "time")]
        found.add_row(*cells)
    return found


def _numbers(entry: Entry, *names: str) -> list[tuple[str, str]]:
    found = [("step", f"{entry.metrics['step']:.0f}")] if "step" in entry.metrics else []
    found += [(name, short(entry.metrics[name])) for name in names if name in entry.metrics]
    return [*found, ("time", duration(entry.seconds))] if entry.seconds else found


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
