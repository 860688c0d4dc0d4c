"""Every registered strategy reads every other's checkpoints: `python -m tests.moves`.

Each ordered pair of strategies on a changed number of ranks, and each to one other on as many: a run is trained,
killed, and goes on there; the rest of its losses is held against the run that stayed. Then kinds of models and
numbers, on some of these moves, and what the comparison says when something is lost on purpose. Writes
`docs/any-to-any.md`. Exit code 1: something differed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from strategies.testing import Workers
from tests.moves import job, plan
from tests.moves.controls import CONTROLS, lose
from tests.moves.plan import Move, Place
from tests.moves.runner import Result, Runner
from tests.moves.table import document

Step = Callable[[str], None]


def measure_grid(runner: Runner, moves: Iterable[Move], step: Step) -> list[Result]:
    """All of them; where the world stays, with dropout: random streams move too."""
    found = []
    for move in moves:
        step(str(move))
        found.append(runner.move(move, *(job.DROPOUT if move.kind == "stays" else ())))
    return found


def measure_kinds(workers: Workers, folder: Path, moves: Sequence[Move], step: Step) -> dict[str, list[Result]]:
    """Other models and numbers on some moves."""
    found = {}
    for name, kind in job.KINDS.items():
        runner = Runner(workers=workers, folder=folder / name, kind=kind)
        found[name] = []
        for move in moves:
            step(f"{name}: {move}")
            found[name].append(runner.move(move))
    return found


def measure_controls(runner: Runner, move: Move, step: Step) -> dict[str, Result]:
    """What is lost on purpose must be noticed."""
    found = {}
    for name, change in CONTROLS.items():
        step(f"without {name}: {move}")
        folder = runner.begun(move.source, *job.DROPOUT)
        lose(folder, change)
        found[name] = runner.move(move, *job.DROPOUT, folder=folder)
    return found


def control_move(found: Sequence[Place]) -> Move:
    """Between two strategies on two ranks each."""
    two = [place for place in found if place.size == 2]
    return Move(source=two[0], target=two[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="tests.moves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategies", nargs="+", help="some of those that are registered; the table isn't written")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one, removed if all is well")
    parser.add_argument("--table", type=Path, default=job.ROOT / "docs" / "any-to-any.md")
    options = parser.parse_args(arguments)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="moves-"))).absolute()
    workers, begin = Workers(most=max(plan.SIZES)), time.time()
    try:
        found = plan.places(workers, options.strategies)
        moves, some = plan.grid(found), plan.sample(plan.grid(found), len({place.strategy for place in found}) + 2)
        total = len(moves) + len(some) * len(job.KINDS) + len(CONTROLS)
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=sys.stdout)) as bar, contextlib.redirect_stdout(io.StringIO()):
            task = bar.add_task("", total=total)

            def step(text: str) -> None:
                bar.update(task, description=text, completed=next(numbers))

            numbers = iter(range(total + 1))
            runner = Runner(workers=workers, folder=folder / "grid")
            results = measure_grid(runner, moves, step)
            kinds = measure_kinds(workers, folder, some, step)
            controls = measure_controls(runner, control_move(found), step)
            bar.update(task, completed=total)
    finally:
        workers.close()
    text = document(found, results, kinds, controls, versions(time.time() - begin))
    wrong = [
        f"{name}{result.move}: {problem}"
        for name, part in (("", results), *((f"{name}: ", part) for name, part in kinds.items()))
        for result in part
        for problem in result.problems
    ] + [f"without {name}: nothing was noticed" for name, result in controls.items() if not result.problems]
    for line in wrong:
        print(f"PROBLEM {line}")
    if not options.strategies:
        options.table.write_text(text)
        print(f"{len(results)} moves: {options.table}")
    else:
        print(text)
    if wrong:
        print(f"the runs are in {folder}")
        return 1
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


def versions(seconds: float) -> str:
    """On what it was measured."""
    return f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {seconds / 60:.0f} minutes"


if __name__ == "__main__":
    sys.exit(main())
