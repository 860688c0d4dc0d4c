"""Many training jobs from one command: every combination of some values, or a search for the best."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.launch import Launcher
    from trainer.launch.book import Book, Entry, Objective, Standing
    from trainer.launch.search import Search
    from trainer.launch.space import SearchSpace
    from trainer.launch.sweep import Plan

_POLL_S = 1.0
_WIDTH = 160
"""Of a table that goes into a file."""
_SEARCHES = ("grid", "optuna", "sagemaker")
_ONLY_OPTUNA = ("trials", "sampler", "pruner", "prune_after", "search_seed")


def add_options(parser: Parser) -> None:
    """Those of `shardwright launch` that belong to sweeps."""
    found = parser.add_argument_group(
        "many jobs",
        "With --multirun the job's words may hold several values: optimizer.lr=1e-3,1e-2 model=glob(llama_t*) "
        "trainer.global_batch=range(8,33,8). Each combination is a job with a folder of its own. launcher.jobs=N runs "
        "N of them at the same time. The same command again goes on; jobs that finished aren't run again. At the end: "
        "comparison.csv and comparison.png. Exit code 0: all finished, 1: some failed, 75: stopped, start again.",
    )
    found.add_argument("-m", "--multirun", action="store_true", help="run all combinations, or search among them")
    found.add_argument("--sweep-dir", type=Path, metavar="DIR", help="default: runs/sweep-<what varies>-<digest>")
    found.add_argument("--objective", metavar="NAME", help="compare by this; default: val_loss, or loss without one")
    found.add_argument("--maximize", action="store_true", help="more of it is better; default: less")
    found.add_argument("--rerun-failed", action="store_true", help="run the jobs again that have failed")
    found.add_argument(
        "--search",
        choices=_SEARCHES,
        help="grid (default): every combination. optuna: look for the best one, also between values, as in "
        "optimizer.lr=tag(log,interval(1e-4,1e-1)); stops jobs that do worse than the others did. sagemaker: "
        "the same, as a tuning job of SageMaker's (launcher=sagemaker)",
    )
    found.add_argument("--trials", type=int, metavar="N", help="optuna: jobs in all; default: 20")
    found.add_argument("--sampler", choices=("tpe", "random"), help="optuna: how the next is chosen; default: tpe")
    found.add_argument(
        "--pruner",
        choices=("median", "halving", "none"),
        help="optuna: which jobs are stopped early. median (default): worse than half of the others at that step; "
        "halving: only the best third goes on, then its best third, ...; none",
    )
    found.add_argument(
        "--prune-after", type=int, metavar="STEPS", help="optuna: no job is stopped before this step; default: 0"
    )
    found.add_argument("--search-seed", type=int, metavar="N", help="optuna: another one tries others; default: 0")


def refuse_alone(options: Namespace) -> None:
    """Options of sweeps without --multirun, and those of a search without it.

    Raises:
        ConfigError: names the option.
    """
    from strategies.errors import ConfigError

    sweeps = ("sweep_dir", "objective", "maximize", "rerun_failed", "search", *_ONLY_OPTUNA)
    searches = options.search in ("optuna", "sagemaker")
    wanted = "--multirun" if not options.multirun else "" if searches else "--search optuna"
    alone = sweeps if not options.multirun else _ONLY_OPTUNA if wanted else ()
    for name in alone:
        if getattr(options, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"launch: {flag} needs {wanted}. Add that, or leave {flag} out ({flag}).")


def main(options: Namespace, launcher: Launcher, words: Sequence[str]) -> int:
    """Run the sweep and compare its jobs.

    Args:
        options: of `shardwright launch`.
        launcher: starts the jobs.
        words: of the job.
    """
    from rich.console import Console

    from strategies.errors import ConfigError
    from trainer.launch import ArrayLauncher
    from trainer.launch.board import Board
    from trainer.launch.book import Book, Objective
    from trainer.launch.search import Grid
    from trainer.launch.space import combinations, edges, search_space
    from trainer.launch.sweep import Plan, Sweep

    if options.search == "sagemaker":
        return _tune(options, launcher, words)
    if options.dry_run and (options.search == "optuna" or not isinstance(launcher, ArrayLauncher)):
        raise ConfigError(
            "launch: --dry-run shows one job, the grid of launcher=slurm, or --search sagemaker. Leave it out "
            "(--dry-run)."
        )
    objective = Objective(name=options.objective, maximize=options.maximize)
    space: SearchSpace | None = None
    if options.search == "optuna":
        space = search_space(words)
        if not space.parameters:
            raise ConfigError(
                "launch: --search optuna has nothing to look for. Give a key several values, as in "
                "optimizer.lr=tag(log,interval(1e-4,1e-1)) (--search)."
            )
        fixed, jobs = list(space.fixed), edges(space)
    else:
        fixed, jobs = combinations(words)
    script = options.script.resolve()
    plan = Plan(script=script, fixed=tuple(fixed), objective=objective, rerun_failed=options.rerun_failed)
    folder = (options.sweep_dir or default_folder(script, words, jobs, options.search)).absolute()
    if options.dry_run and isinstance(launcher, ArrayLauncher):
        whole = [plan.job(folder, entry) for entry in iter(Grid(jobs, []).ask, None)]
        launcher.check(whole)
        print(launcher.shown_array(whole))
        return 0
    book = Book(folder, about(plan, launcher, words if space else None, options))
    try:
        search = Grid(jobs, book.entries) if space is None else _optuna(options, space, objective, book)
        console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
        if any(plan.to_do(entry) for entry in book.entries) or len(book.entries) < search.total:
            check(plan, launcher, book, jobs)
        _say(console, begin(book, search, launcher, plan))
        if space is None:
            book.entries.extend(iter(search.ask, None))  # so that those that wait are shown
        over = [entry for entry in book.entries if not plan.to_do(entry)]
        with Board(objective, lambda: search.total, console, over) as board:
            code = Sweep(plan, book, search, launcher, board.show, board.say, _POLL_S).run()
        compare(console, book, objective)
        _say(console, end(book, search, code, plan))
        return code
    finally:
        book.close()


def _tune(options: Namespace, launcher: Launcher, words: Sequence[str]) -> int:
    """Leave the search to SageMaker."""
    from strategies.errors import ConfigError
    from trainer.checking import refuse_wrong_jobs
    from trainer.launch import SageMakerLauncher
    from trainer.launch.sagemaker_tuning import Tuning, refuse_unfit, tune
    from trainer.launch.space import edges, search_space

    if not isinstance(launcher, SageMakerLauncher):
        raise ConfigError("launch: --search sagemaker is a service of SageMaker's. Add launcher=sagemaker (--search).")
    for name in ("prune_after", "sweep_dir", "rerun_failed"):
        if getattr(options, name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"launch: a tuning job of SageMaker's has nothing like {flag}. Leave it out ({flag}).")
    if options.pruner == "halving":
        raise ConfigError("launch: a tuning job stops bad ones by the median. Use --pruner median or none (--pruner).")
    space = search_space(words)
    script = options.script.resolve()
    given = {"metric": options.objective, "trials": options.trials, "seed": options.search_seed}
    tuning = Tuning(
        space=space,
        maximize=options.maximize,
        guided=options.sampler != "random",
        stop_bad=options.pruner != "none",
        **{name: value for name, value in given.items() if value is not None},
    )
    refuse_unfit(launcher, tuning)
    refuse_wrong_jobs(script, {f"the job {' '.join(job)}": (*space.fixed, *job) for job in edges(space)})
    name = options.name or default_folder(script, words, edges(space), options.search).name
    code, text = tune(launcher, script, name, tuning, dry=options.dry_run)
    _print(text)
    return code


def _print(text: str) -> None:
    if text:
        print(text)


def _optuna(options: Namespace, space: SearchSpace, objective: Objective, book: Book) -> Search:
    from trainer.launch.optuna_search import OptunaSearch, Settings

    given = {name: getattr(options, name) for name in _ONLY_OPTUNA}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    return OptunaSearch(space, settings, objective, book.entries)


def default_folder(script: Path, words: Sequence[str], jobs: Sequence[tuple[str, ...]], search: str | None) -> Path:
    """The same for the same command; how the jobs are started doesn't count, nor how many a search may try."""
    names = [word.partition("=")[0].rpartition(".")[2] for word in jobs[0]]
    varied = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(names))[:40].strip("-") or "one"
    return Path("runs") / f"sweep-{varied}-{_digest([str(script), search or 'grid', *words])}"


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:6]


def about(plan: Plan, launcher: Launcher, searched: Sequence[str] | None, options: Namespace) -> dict[str, object]:
    """What all jobs of the sweep share, without secrets."""
    from trainer.secrets import redacted_words

    found: dict[str, object] = {
        "launcher": type(launcher).__name__,
        "script": str(plan.script),
        "search": options.search or "grid",
        "settings": redacted_words(plan.fixed),
        "settings_digest": _digest(plan.fixed),
    }
    if searched is not None:  # what was learned before holds for these ranges and this objective
        better = "maximize" if options.maximize else "minimize"
        found |= {"space": redacted_words(searched), "objective": f"{better} {options.objective or 'val_loss or loss'}"}
    return found


def check(plan: Plan, launcher: Launcher, book: Book, jobs: Sequence[tuple[str, ...]]) -> None:
    """Refuse now what would fail later.

    Raises:
        ConfigError: names the job.
    """
    from trainer.checking import refuse_wrong_jobs
    from trainer.launch.book import Entry

    over = {entry.words for entry in book.entries if not plan.to_do(entry)}
    new = [Entry(name="job", words=words) for words in jobs if words not in over]
    entries = new + [entry for entry in book.entries if plan.to_do(entry) and entry.words not in jobs]
    launcher.check([plan.job(book.folder, entry) for entry in entries])
    named = {f"the job {' '.join(entry.words)}".rstrip(): (*plan.fixed, *entry.words) for entry in entries}
    refuse_wrong_jobs(plan.script, named)


def begin(book: Book, search: Search, launcher: Launcher, plan: Plan) -> list[str]:
    """What is going to be done, and what isn't."""
    from trainer.launch.book import Standing

    counts = _counts(book.entries)
    failed = "failed before, run again" if plan.rerun_failed else "failed before, left alone"
    most = "all at once" if launcher.at_once is None else f"at most {launcher.at_once} at once"
    lines = [f"sweep in {_shown(book.folder)}: {search.total} jobs, {most}"]
    parts = {
        "finished before": counts.get(Standing.finished, 0) + counts.get(Standing.pruned, 0),
        "still running or just ended": counts.get(Standing.running, 0),
        "to go on": counts.get(Standing.stopped, 0),
        failed: counts.get(Standing.failed, 0),
    }
    if any(parts.values()):
        new = search.total - sum(parts.values())
        told = ", ".join(f"{number} {what}" for what, number in (parts | {"new": new}).items() if number)
        left = counts.get(Standing.failed, 0) and not plan.rerun_failed
        lines.append(told + (" (--rerun-failed runs them again)" if left else ""))
    return lines


def compare(console: Console, book: Book, objective: Objective) -> None:
    """Show the table, and write the table and the picture into the sweep's folder."""
    from trainer.launch.board import table
    from trainer.launch.comparison import write_csv, write_picture

    if not book.entries:
        return
    name = objective.named(book.entries)
    best = "largest" if objective.maximize else "smallest"
    console.print(table(objective.ranked(book.entries), name, f"by {name}, {best} first"))
    files = [book.folder / "comparison.csv"]
    write_csv(files[0], book.entries, objective)
    if write_picture(book.folder / "comparison.png", book.entries, objective):
        files.append(book.folder / "comparison.png")
    _say(console, [f"{entry.name} failed: {entry.detail}" for entry in book.entries if entry.detail])
    _say(console, [_shown(path) for path in files])


def end(book: Book, search: Search, code: int, plan: Plan) -> list[str]:
    """What is left to do, and how."""
    from trainer.launch.book import Standing

    counts, lines = _counts(book.entries), []
    known = sorted({name for entry in book.entries for name in entry.metrics})
    if plan.objective.name is not None and known and plan.objective.name not in known:
        lines.append(f"no job has a {plan.objective.name} (--objective); there are: {', '.join(known)}")
    if failed := counts.get(Standing.failed):
        lines.append(
            f"{failed} failed: the same command with --rerun-failed runs {'it' if failed == 1 else 'them'} again"
        )
    left = search.total - sum(counts.get(each, 0) for each in (Standing.finished, Standing.pruned, Standing.failed))
    if running := counts.get(Standing.running):
        lines.append(f"{running} still running: the same command finds {'it' if running == 1 else 'them'} again")
    if code and left:
        lines.append(f"{left} of {search.total} left: the same command goes on")
    return lines


def _counts(entries: Sequence[Entry]) -> Mapping[Standing, int]:
    return Counter(entry.standing for entry in entries)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
