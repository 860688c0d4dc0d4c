"""Campaigns against whole runs: `python -m tests.faults.campaign kills --kills 200 --seed 7`.

    kills      SIGKILL to a rank or the launcher, anywhere; the same command again until the run ends
    terms      SIGTERM instead: exit code 75, a checkpoint at the step where all stopped
    restarts   three SIGKILLs in one launch with --max-restarts 3, which ends well by itself
    damage     checkpoints that were damaged or only half uploaded

Each compares with the uninterrupted run, prints its seed and writes `result.json`. Exit code 1: something differed;
the command that repeats the case is printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults import compare, plan
from tests.faults.plan import SAVE, Fault, from_json, to_json
from tests.faults.running import ROOT, Ending, start

STEPS = 60
PER_RUN = 8
"""Faults in one run before it is left to finish."""
SMALL = (
    "data=text",
    f"data.paths=[{ROOT / 'strategies' / 'base.py'}]",
    "data.length=16",
    "trainer.global_batch=12",
    "trainer.micro_batch=1",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every=1",
    "trainer.eval_every=5",
    "trainer.eval_samples=8",
    "trainer.ema_decay=0.9",
    "optimizer.lr=5e-3",
    "logger=[]",
    "hooks=[]",
    "checkpoint.keep=2",
)
"""The job: accumulation, dropout, a running average, evaluations."""
LLAMA = (
    "model=llama_tiny",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "model.config.attention_dropout=0.1",
)
_RESULT = "result.json"


@dataclass(kw_only=True)
class Campaign:
    """What all campaigns have in common: a job, a place, and what went wrong so far."""

    what: str
    folder: Path
    seed: int
    words: tuple[str, ...] = ()
    processes: int = 2
    tolerance: float = 0.0
    async_saves: tuple[bool, ...] = (False, True)
    """Taken in turns by the starts."""
    places: tuple[tuple[str, int], ...] = ()
    """Strategies and numbers of processes, in turns too; none: always `processes`, and the strategy of `words`."""
    problems: list[str] = field(default_factory=list)
    strikes: list[dict[str, Any]] = field(default_factory=list)
    _starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begin = time.time()

    def reference(self) -> Path:
        """The uninterrupted run; made once."""
        whole = self.folder / "whole"
        if not (whole / "summary.json").is_file():
            ending = self.start(whole, [], every=3)
            if ending.code != 0:
                raise SystemExit(f"the uninterrupted run ended with {ending.code}: see {self.folder / 'whole.log'}")
        return whole

    def start(self, run: Path, faults: Sequence[Fault], every: int, max_restarts: int = 0) -> Ending:
        """The same command once more."""
        cache = self.folder / f"{run.name}.cache"
        if any(fault.phase == "tokenising" for fault in faults):
            shutil.rmtree(cache, ignore_errors=True)  # as on a fresh machine
        saves = self.async_saves[self._starts % len(self.async_saves)]
        place, processes = [], self.processes
        if self.places:
            strategy, processes = self.places[self._starts % len(self.places)]
            place = [f"strategy={strategy}"]
        self._starts += 1
        words = (*SMALL, *self.words, *place, f"checkpoint.every={every}", f"checkpoint.async_save={saves}".lower(),
                 f"run.dir='{run}'", f"cache='{cache}'")  # fmt: skip
        log = self.folder / f"{run.name}.log"
        return start(words, log, faults, processes=processes, max_restarts=max_restarts)

    def runs(self, faults: Sequence[Fault]) -> Iterator[tuple[Path, Fault, Ending]]:
        """Run after run, each with some of `faults`, until all have struck; each run must end like the whole one."""
        whole, waiting, number = self.reference(), list(faults), 0
        while waiting:
            number += 1
            run, struck = self.folder / f"{self.what}-{number:03}", list[Fault]()
            while True:
                fault = waiting[0] if waiting and len(struck) < PER_RUN else None
                ending = self.start(run, [fault] if fault else [], every=2 + number % 2)
                if fault and ending.struck:
                    struck.append(waiting.pop(0))
                    yield run, fault, ending
                if ending.code is None:
                    self.problem(run, struck[-1:], f"{ending.left} processes were left after {ending.seconds:.0f} s")
                if fault and ending.struck:
                    continue
                if ending.code != 0:
                    self.problem(run, struck, f"a start that nobody disturbed ended with {ending.code}")
                break
            if not struck:
                self.problem(run, waiting[:1], "this fault never strikes, not even in a fresh run")
                return
            self.check(run, whole, struck)

    def check(self, run: Path, whole: Path, struck: Sequence[Fault]) -> None:
        """It must have learned what the uninterrupted one did."""
        found = compare.differences(run, whole, self.tolerance)
        for text in found[:5]:
            self.problem(run, struck, text)
        say(f"{run.name}: {len(struck)} faults, {'the same as uninterrupted' if not found else 'DIFFERS'}")
        if not found:
            shutil.rmtree(run)
            shutil.rmtree(self.folder / f"{run.name}.cache", ignore_errors=True)

    def problem(self, run: Path, faults: Sequence[Fault], text: str) -> None:
        """Say so, with the command that repeats it."""
        again = f"python -m tests.faults.campaign {self.what} --processes {self.processes} --faults"
        self.problems.append(f"{run}: {text}")
        say(f"PROBLEM {run}: {text}\n  again: {again} {shlex.quote(to_json(faults))}")

    def note(self, number: int, total: int, fault: Fault, ending: Ending, **more: Any) -> None:
        """A line of progress, and one of the result."""
        entry = {"number": number, **asdict(fault), "code": ending.code, "took_s": ending.took_s, **more}
        self.strikes.append(entry)
        extra = " ".join(f"{name}={value}" for name, value in more.items())
        gone = "" if ending.took_s is None else f", all gone after {ending.took_s:.1f} s"
        say(
            f"[{number}/{total}] {fault.kind} {fault.victim} in {fault.phase} #{fault.occurrence} "
            f"+{fault.delay_s:.3f} s: code {ending.code}{gone} {extra}"
        )

    def result(self, **more: Any) -> int:
        """Write `result.json`; the exit code."""
        slowest = max((entry["took_s"] or 0.0 for entry in self.strikes), default=0.0)
        summary = {
            "seed": self.seed,
            "processes": self.processes,
            "faults": len(self.strikes),
            "in_a_save": sum(entry["phase"] in SAVE for entry in self.strikes),
            "slowest_end_s": round(slowest, 2),
            "seconds": round(time.time() - self._begin),
            "problems": self.problems,
            **more,
        }
        (self.folder / _RESULT).write_text(json.dumps({**summary, "strikes": self.strikes}, indent=1))
        say(json.dumps(summary, indent=1))
        return 1 if self.problems else 0


def kills(campaign: Campaign, faults: Sequence[Fault]) -> int:
    """SIGKILLs."""
    for run, fault, ending in campaign.runs(faults):
        lost = compare.reached(run) - compare.saved(run)
        campaign.note(len(campaign.strikes) + 1, len(faults), fault, ending, steps_to_do_again=lost)
        if fault.victim != "launcher" and ending.code == 0:
            campaign.problem(run, [fault], "a worker was killed, and the launcher answered 0")
    return campaign.result(steps_done_again=sum(entry["steps_to_do_again"] for entry in campaign.strikes))


def terms(campaign: Campaign, faults: Sequence[Fault]) -> int:
    """SIGTERMs."""
    late = 0
    for run, fault, ending in campaign.runs(faults):
        seen, kept = compare.reached(run), compare.saved(run)
        campaign.note(len(campaign.strikes) + 1, len(faults), fault, ending, step=seen, checkpoint=kept)
        if seen != kept:
            campaign.problem(
                run, [fault], f"metrics.jsonl reaches step {seen}, the newest checkpoint is of step {kept}"
            )
        finished = seen == STEPS and ending.code == 0
        late += finished
        if ending.code != 75 and not finished:
            campaign.problem(run, [fault], f"the launcher answered {ending.code}, not 75")
    return campaign.result(after_the_end=late)


def restarts(campaign: Campaign, tries: Sequence[Sequence[Fault]]) -> int:
    """Three SIGKILLs in one launch."""
    whole = campaign.reference()
    for number, faults in enumerate(tries, 1):
        run = campaign.folder / f"{campaign.what}-{number:03}"
        ending = campaign.start(run, faults, every=2, max_restarts=3)
        if ending.code != 0 or len(ending.struck) != len(faults):
            campaign.problem(run, faults, f"code {ending.code} after {len(ending.struck)} of {len(faults)} kills")
        ending = replace(ending, took_s=None)  # it was to go on
        campaign.note(number, len(tries), faults[-1], ending, kills=len(ending.struck), seconds=round(ending.seconds))
        campaign.check(run, whole, faults)
    return campaign.result()


def _place(text: str) -> tuple[str, int]:
    strategy, _, processes = text.partition("@")
    return strategy, int(processes)


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="tests.faults.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "terms", "restarts", "damage"))
    parser.add_argument("--kills", "--count", "--tries", type=int, dest="count", default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--async", action="store_true", dest="only_async", help="asynchronous saves only, not in turns")
    parser.add_argument("--llama", action="store_true", help="a small Llama instead of the script's own model")
    parser.add_argument("--tolerance", type=float, default=0.0, help="how far losses may differ; 0: bit for bit")
    parser.add_argument(
        "--places", type=_place, nargs="+", default=(), help="strategy@processes, the next one for each start"
    )
    parser.add_argument("--faults", type=from_json, help="a plan that a campaign printed, instead of a seed")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options, words = parser.parse_known_args(arguments)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix=f"faults-{options.what}-"))).absolute()
    say(f"seed {options.seed}, in {folder}")
    if options.what == "damage":
        from tests.faults.damage import campaign as damage_campaign

        return damage_campaign(folder, options.seed, options.count)
    campaign = Campaign(
        what=options.what,
        folder=folder,
        seed=options.seed,
        words=(*(LLAMA if options.llama else ()), *words),
        processes=options.processes,
        tolerance=options.tolerance,
        async_saves=(True,) if options.only_async else (False, True),
        places=tuple(options.places),
    )
    seed, count, processes = options.seed, options.count, options.processes
    if options.what == "kills":
        return kills(campaign, options.faults or plan.kills(seed, count, processes))
    if options.what == "terms":
        return terms(campaign, options.faults or plan.terms(seed, count, processes))
    return restarts(campaign, [options.faults] if options.faults else plan.deaths(seed, count, processes=processes))


if __name__ == "__main__":
    sys.exit(main())
