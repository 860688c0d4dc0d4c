"""The doctor's report on a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trainer.doctor.findings import Finding, Level, listed
from trainer.metrics.text import byte_size

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
    console.print(f"{counts[Level.failure]} failed, {counts[Level.warning]} to look at, {counts[Level.ok]} well")


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


@contextlib.contextmanager
def progress(shown: bool) -> Iterator[Callable[[str], None]]:
    """What is being done: on a terminal a line that changes, elsewhere one now and then."""
    if not shown:
        yield lambda what: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("doctor") as status:
            yield lambda what: status.update(f"doctor: {what}")
        return
    said = [time.monotonic()]

    def say(what: str) -> None:
        if time.monotonic() - said[0] > _SILENCE_S:
            said[0] = time.monotonic()
            console.print(f"doctor: {what}", highlight=False)

    yield say
