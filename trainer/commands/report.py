"""Show how a run went, or how it goes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from trainer.commands import Parser


def parser() -> Parser:
    """`shardwright report`'s own options."""
    found = Parser("report", "Show how a run went, or how it goes, and draw its plots again.")
    found.add_argument("run", type=Path, help="the run's folder, such as runs/first")
    return found


def main(options: Namespace) -> int:
    """Print the summary of a run's folder, and draw its plots again."""
    from rich.console import Console

    from strategies.errors import ConfigError
    from trainer.metrics.jsonl import read
    from trainer.metrics.summary import summary_table
    from trainer.observer import draw_plots

    folder: Path = options.run
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"report: {folder} holds no metrics.jsonl. Name a run's folder, such as runs/first.")
    lines, summary = read(folder / "metrics.jsonl"), _summary(folder)
    if summary is not None:
        Console().print(summary_table(summary, folder))
    if lines and (summary is None or lines[-1]["step"] > summary.get("step", 0)):
        print(f"{'not ended yet, or killed' if summary is None else 'went on since'}: {_newest(lines)}")
    for path in draw_plots(folder, print):
        print(path)
    return 0


def _summary(folder: Path) -> dict[str, Any] | None:
    """That of the run's last start that came to an end; None: there is none."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary


def _newest(lines: list[dict[str, Any]]) -> str:
    """The newest number of each kind that people ask for."""
    from trainer.metrics.text import compact, short

    newest: dict[str, Any] = {}
    for line in lines:
        newest |= line
    shown = {"loss": short, "val_loss": short, "tokens": compact, "tokens_per_s": compact}
    found = [f"{key} {write(newest[key])}" for key, write in shown.items() if key in newest]
    return ", ".join([f"step {newest['step']:,}", *found])
