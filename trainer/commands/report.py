"""Show how a run went."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import ConfigError
from trainer.observer import draw_plots


def main(words: Sequence[str]) -> int:
    """Print the summary of a run's folder, and draw its plots again."""
    parser = argparse.ArgumentParser(
        prog="shardwright report", description="Show how a run went, and draw its plots again."
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/first")
    folder = parser.parse_args(list(words)).run
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"report: {folder} holds no metrics.jsonl. Name a run's folder, such as runs/first.")
    _show(folder)
    for path in draw_plots(folder, print):
        print(path)
    return 0


def _show(folder: Path) -> None:
    from rich.console import Console

    from trainer.metrics.summary import summary_table

    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        print(f"{folder} has no summary yet: it is still going, or was killed.")
        return
    Console().print(summary_table(summary, folder))
