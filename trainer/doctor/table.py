"""The doctor's report on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.doctor.findings import Finding, Level, listed
from trainer.metrics.text import byte_size

if TYPE_CHECKING:
    from rich.status import Status

_COLOURS = {Level.ok: "green", Level.warning: "yellow", Level.failure: "bold red"}
_SILENCE_S = 10.0


def show(title: str, findings: Sequence[Finding], collectives: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what was found, what to do about it, and the measured rates."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=title, title_justify="left", expand=False)
    for column in ("", "looked at", "found"):
        table.add_column(column, overflow="fold", no_wrap=column == "")
    for finding in findings:
        where = f"{listed(finding.where)}: " if finding.where and not _named(finding) else ""
        text = Text(f"{where}{finding.what}")
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="italic")
        mark = Text(finding.level.value, style=_COLOURS[finding.level])
        table.add_row(mark, finding.check, text)
    console.print(table)
    if any(collectives.values()):
        console.print(_rates(collectives))
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(
        f"{counts[Level.failure]} failed, {counts[Level.warning]} to look at, {counts[Level.ok]} well", highlight=False
    )


def _named(finding: Finding) -> bool:
    """The text names them itself."""
    return all(name in finding.what for name in finding.where)


def _rates(collectives: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    from rich.table import Table

    table = Table(title="Bus bandwidth in GB/s, as NCCL's tests define it (time of one in ms)", title_justify="left")
    table.add_column("size", justify="right")
    for name in collectives:
        table.add_column(name.replace("_", "-"), justify="right")
    for size in sorted({int(row["bytes"]) for rows in collectives.values() for row in rows}):
        cells = []
        for rows in collectives.values():
            row = next((each for each in rows if each["bytes"] == size), None)
            cells.append("" if row is None else f"{row['bus_gb_per_s']:,.3f} ({row['ms']:,.3f})")
        table.add_row(byte_size(size), *cells)
    return table


class Progress:
    """What is being done, on stderr: on a terminal a line that changes, elsewhere one now and then.

    Args:
        shown: whether at all; on one rank.
    """

    def __init__(self, shown: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True) if shown else None
        self._said = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if self._console is not None and self._console.is_terminal:
            self._status = self._console.status("doctor")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Before anything else is printed; may be called twice."""
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """Now it is this."""
        if self._status is not None:
            self._status.update(f"doctor: {what}")
        elif self._console is not None and time.monotonic() - self._said > _SILENCE_S:
            self._said = time.monotonic()
            self._console.print(f"doctor: {what}", highlight=False)
