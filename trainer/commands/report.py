"""Show how a run went, or how it goes; several side by side."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import Parser

if TYPE_CHECKING:
    from trainer.report import Run


def parser() -> Parser:
    """`shardwright report`'s own options."""
    found = Parser("report", "Show how runs went, or go, in one HTML page that needs nothing else.")
    found.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/first")
    found.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the page (default: report.html in the run's folder; of several runs, in the folder that holds the first)",
    )
    found.add_argument("--open", action="store_true", help="show the page in a browser")
    return found


def main(options: Namespace) -> int:
    """Print the summaries, draw the plots again, and write the page."""
    from strategies.errors import ConfigError
    from trainer.observer import draw_plots
    from trainer.report import is_run, read_run, write_page

    folders: list[Path] = list(dict.fromkeys(options.runs))
    for folder in folders:
        if not is_run(folder):
            raise ConfigError(
                f"report: {folder} holds none of metrics.jsonl, events.jsonl and config.yaml. "
                "Name a run's folder, such as runs/first."
            )
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for run in runs:
        _show(run)
        for path in draw_plots(run.folder, print):
            print(path)
    beside = folders[0] if len(folders) == 1 else folders[0].resolve().parent
    page: Path = options.output or beside / "report.html"
    try:
        write_page(runs, page)
    except OSError as error:
        raise ConfigError(f"report: {page} can't be written: {error.strerror}. Choose another (--output).") from error
    print(page)
    if options.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: as their folders, with those above where these alone don't tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _show(run: Run) -> None:
    from rich.console import Console

    from trainer.metrics.summary import summary_table

    if run.summary is not None:
        Console().print(summary_table(run.summary, run.folder))
    print(run.since_summary() or run.state())
