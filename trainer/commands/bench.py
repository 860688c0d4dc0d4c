"""Measure what the Trainer costs over a loop written by hand."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trainer.commands import Parser

if TYPE_CHECKING:
    from trainer.bench import Bench, Case, Results

T = TypeVar("T")
_SAVES = 4
_STEPS_BETWEEN_SAVES = {"tiny": 60, "small": 10, "1b": 40}


def parser() -> Parser:
    """`shardwright bench`'s own options."""
    found = Parser("bench", "Train the same job with the Trainer and with a loop written by hand, in turns.")
    found.add_argument("--rounds", type=int, default=7, help="of each case (default: 7)")
    found.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    found.add_argument(
        "--model",
        nargs="+",
        default=["tiny", "small"],
        help="tiny: 0.9M parameters, small: 27.6M; 1b: 1.2B, for GPUs (default: tiny small)",
    )
    found.add_argument(
        "--strategy",
        nargs="+",
        help="single, ddp, fsdp_full, fsdp_hybrid (two groups) (default: single for one process, else ddp)",
    )
    found.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    found.add_argument("--compile", action="store_true", help="both sides through torch.compile")
    found.add_argument("--steps", type=int, help="of a run (default: by model)")
    found.add_argument("--threads", type=int, default=1, help="of torch in each process (default: 1)")
    found.add_argument("--no-checkpoints", action="store_true", help="leave out what checkpoints cost")
    found.add_argument("--output", type=Path, metavar="NAME.md", help="write the page, and every number beside it")
    return found


def main(options: Namespace) -> int:
    """Run the rounds, and print and write the tables."""
    from strategies.errors import ConfigError, nearest
    from trainer.bench import MODELS, STRATEGIES, Bench, Case, to_json, to_markdown

    for key, given, known in (("model", options.model, MODELS), ("strategy", options.strategy or (), STRATEGIES)):
        for name in given:
            if name not in known:
                raise ConfigError(f"bench: --{key} {name} is not a choice. {nearest(name, known)}")
    for name, value in (("rounds", options.rounds), ("steps", options.steps), ("threads", options.threads),
                        *(("processes", value) for value in options.processes)):  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"bench: --{name} {value} is below 1. Give a whole number from 1 on.")
    cases = [
        Case(
            model=name,
            processes=processes,
            steps=options.steps or MODELS[name].steps,
            strategy=strategy,
            precision=options.precision,
            compile=options.compile,
        )
        for name in options.model
        for processes in options.processes
        for strategy in options.strategy or ["single" if processes == 1 else "ddp"]
    ]
    for case in cases:
        spread = STRATEGIES[case.strategy]
        if case.processes > (spread.most or case.processes) or case.processes % spread.multiple:
            fitting = "1" if spread.most else f"a multiple of {spread.multiple}"
            raise ConfigError(
                f"bench: --processes {case.processes} is not for --strategy {case.strategy}. Give {fitting}."
            )
    with tempfile.TemporaryDirectory(prefix="shardwright-bench-") as folder:
        bench = Bench(Path(folder), options.threads)
        steps = _Progress(len(cases) * (options.rounds * 3 + (0 if options.no_checkpoints else 3)) + 1)
        steps.run("warm-up", lambda: bench.ours(dataclasses.replace(cases[0], steps=2)))
        results = [_measure(bench, case, options, steps) for case in cases]
    page = to_markdown(results, options.output.stem if options.output else "bench")
    print(page)
    if options.output:
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(page)
            options.output.with_suffix(".json").write_text(to_json(results))
        except OSError as error:
            raise ConfigError(
                f"bench: {options.output} can't be written: {error.strerror}. Choose another (--output)."
            ) from error
    return 0


def _measure(bench: Bench, case: Case, options: Namespace, steps: _Progress) -> Results:
    from trainer.bench import Results

    found = Results(case=case)
    name = f"{case.model}, {case.strategy}, {case.processes} processes"
    for number in range(1, options.rounds + 1):
        where = f"{name}, round {number}"
        found.before.append(steps.run(f"{where}, by hand", lambda: bench.loop(case)))
        found.ours.append(steps.run(f"{where}, ours", lambda: bench.ours(case)))
        found.after.append(steps.run(f"{where}, by hand", lambda: bench.loop(case)))
    if not options.no_checkpoints:
        every = _STEPS_BETWEEN_SAVES[case.model]
        found.loop_saves_s = steps.run(f"{name}, saves by hand", lambda: bench.loop_saves(case, _SAVES))
        found.waited_for = steps.run(
            f"{name}, our saves", lambda: bench.our_saves(case, _SAVES, every, background=False)
        )
        found.background = steps.run(
            f"{name}, our saves in the background", lambda: bench.our_saves(case, _SAVES, every, background=True)
        )
    return found


class _Progress:
    """A line for each run, with the time left."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def run(self, name: str, what: Callable[[], T]) -> T:
        found = what()
        self._done += 1
        left = (time.monotonic() - self._begin) / self._done * (self._total - self._done)
        print(f"[{self._done}/{self._total}, {left / 60:.0f} min left] {name}", file=sys.stderr, flush=True)
        return found
