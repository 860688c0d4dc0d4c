"""One job, by the Trainer or by the hand-written loop, in processes of its own; and what it took."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import TrainingError
from trainer.metrics.events import read_events
from trainer.metrics.jsonl import read

_SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
_LR = 1e-3
_LOG_EVERY = 10
_WARMUP = 20
_FEW_STEPS = 2
_TOKENS = 1 << 24
_PATIENCE_S = 3600
_FROM_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Llama, and how long it is trained."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    length: int
    """Tokens of a sample."""
    steps: int
    batch: int = 1
    """Samples that a rank takes in a step."""

    @property
    def fields(self) -> dict[str, int]:
        """Of its configuration in transformers."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.length,
        }

    @property
    def num_parameters(self) -> int:
        """Those that take part in matrix products, so without the input's embedding."""
        layer = 4 * self.hidden * self.hidden + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden


MODELS = {
    "tiny": Model(vocabulary=256, hidden=128, intermediate=344, layers=4, heads=4, length=128, steps=420),
    "small": Model(vocabulary=8192, hidden=512, intermediate=1376, layers=6, heads=8, length=256, steps=40),
    "1b": Model(vocabulary=32000, hidden=2048, intermediate=8192, layers=16, heads=32, length=2048, steps=60, batch=4),
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The same by both sides."""

    words: tuple[str, ...]
    """In our configuration."""
    by_hand: dict[str, Any]
    """For `scripts/bench_loop.py`."""
    launcher: tuple[str, ...] = ("-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node")
    """A module and its options, before the number of processes and their command."""
    most: int | None = None
    """Processes; None: any number."""
    multiple: int = 1
    """Of which their number must be one."""


STRATEGIES = {
    "single": Spread(words=("strategy=single",), by_hand={"spread": "alone"}, most=1),
    "ddp": Spread(words=("strategy=ddp",), by_hand={"spread": "replicated"}),
    "fsdp_full": Spread(words=("strategy=fsdp_full",), by_hand={"spread": "sharded", "groups": 1}),
    "fsdp_hybrid": Spread(
        words=("strategy=fsdp_hybrid", "strategy.replicas=2"), by_hand={"spread": "sharded", "groups": 2}, multiple=2
    ),
    **{
        f"zero{stage}": Spread(words=(f"strategy=zero{stage}",), by_hand={"spread": "zero", "stage": stage})
        for stage in (1, 2, 3)
    },
    "horovod": Spread(
        words=("strategy=horovod",),
        by_hand={"spread": "rings"},
        launcher=("-m", "horovod.runner.launch", "--gloo", "-np"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained by how many processes."""

    model: str
    processes: int
    steps: int
    strategy: str = "ddp"
    precision: str = "fp32"
    compile: bool = False

    @property
    def tokens_per_step(self) -> int:
        """Of all processes."""
        model = MODELS[self.model]
        return self.processes * model.batch * model.length


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a run took. CPU time is of all its processes, user and system."""

    cpu_ms_per_step: float
    tokens_per_s: float
    startup_s: float
    """From launch to the end of the first step."""
    peak_mib: float
    """The most memory of a process, before the first checkpoint."""
    loss: float
    saves_s: list[float]


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What the checkpoints of a run took."""

    seconds: list[float]
    """From the call until each was complete."""
    stalls_s: list[float]
    """Of these, what the steps waited."""
    quiet_step_s: float
    """A step that no save overlaps."""
    overlapped_step_s: float | None
    """A step while one is written; None: there was none."""


class Bench:
    """Runs jobs in a folder of its own, one at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Make the data.

        Args:
            folder: for data and runs; with room for checkpoints.
            threads: that torch uses in each process.
        """
        self._folder = folder
        self._threads = threads
        self._numbers = itertools.count()
        self._tokens = folder / "tokens.npy"
        folder.mkdir(parents=True, exist_ok=True)
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            text += path.read_bytes()
            if len(text) >= _TOKENS:
                break
        np.save(self._tokens, np.frombuffer(text[:_TOKENS], dtype=np.uint8).astype(np.uint16))

    def ours(self, case: Case, *more: str) -> Taken:
        """Train with the Trainer, as `scripts/train.py` does.

        Args:
            case: what.
            more: overrides of its configuration.
        """
        return self._taken(case, self._train(case, [f"trainer.max_steps={case.steps}", "checkpoint.every=null", *more]))

    def loop(self, case: Case, saves: int = 0) -> Taken:
        """Train with the hand-written loop.

        Args:
            case: what.
            saves: checkpoints that it writes at the end.
        """
        return self._taken(case, self._train_by_hand(case, case.steps, saves))

    def loop_saves(self, case: Case, saves: int) -> list[float]:
        """Seconds of each of some synchronous saves of the hand-written loop."""
        return self._taken(case, self._train_by_hand(case, _FEW_STEPS, saves)).saves_s

    def our_saves(self, case: Case, saves: int, every: int, *, background: bool) -> Saves:
        """Checkpoints of the Trainer while it trains.

        Args:
            case: what.
            saves: how many.
            every: steps between two of them; enough for one to end before the next begins.
            background: `checkpoint.async_save`.
        """
        steps = (saves + 1) * every  # the last save ends the run, so nothing is seen of its steps
        folder = self._train(
            case,
            [
                f"trainer.max_steps={steps}",
                "trainer.log_every=1",
                f"checkpoint.every={every}",
                f"checkpoint.async_save={str(background).lower()}",
                "checkpoint.keep=1",
            ],
        )
        events = [event for event in read_events(folder) if event["event"] == "checkpoint" and event["step"] < steps]
        found = saves_of(events, {line["step"]: line["step_s"] for line in read(folder / "metrics.jsonl")})
        shutil.rmtree(folder)
        return found

    def _train(self, case: Case, more: Sequence[str]) -> Path:
        folder, model = self._new(), MODELS[case.model]
        words = [
            *STRATEGIES[case.strategy].words,
            f"precision={case.precision}",
            f"compile={str(case.compile).lower()}",
            "model=llama_tiny",
            *(f"++model.config.{key}={value}" for key, value in model.fields.items()),
            "data=tokens",
            f"data.paths=[{self._tokens}]",
            "data.isolate_documents=false",
            "data.validation=0",
            f"data.length={model.length}",
            f"optimizer.lr={_LR}",
            f"trainer.global_batch={case.processes * model.batch}",
            f"trainer.micro_batch={model.batch}",
            "trainer.eval_every=null",
            f"trainer.log_every={_LOG_EVERY}",
            "logger=[]",
            "hooks=[clocks]",
            f"cache={self._folder / 'cache'}",
            f"run.dir={folder}",
        ]
        self._start(case, folder, "bench_ours.py", [*words, *more])
        return folder

    def _train_by_hand(self, case: Case, steps: int, saves: int) -> Path:
        folder, model = self._new(), MODELS[case.model]
        job = {
            "folder": str(folder),
            "tokens": str(self._tokens),
            "model": model.fields,
            "length": model.length,
            "steps": steps,
            "log_every": _LOG_EVERY,
            "batch": model.batch,
            "lr": _LR,
            "saves": saves,
            **STRATEGIES[case.strategy].by_hand,
            "precision": case.precision,
            "compile": case.compile,
        }
        self._start(case, folder, "bench_loop.py", [json.dumps(job)])
        return folder

    def _new(self) -> Path:
        folder = self._folder / f"run-{next(self._numbers)}"
        folder.mkdir()
        return folder

    def _start(self, case: Case, folder: Path, script: str, words: Sequence[str]) -> None:
        """Run to the end.

        Raises:
            TrainingError: it failed.
        """
        launcher = [sys.executable, *STRATEGIES[case.strategy].launcher, str(case.processes)]
        command = [*(launcher if case.processes > 1 else []), sys.executable, str(_SCRIPTS / script), *words]
        environment = {key: value for key, value in os.environ.items() if key not in _FROM_LAUNCHERS}
        environment["OMP_NUM_THREADS"] = str(self._threads)
        (folder / "launched").write_text(repr(time.time()))
        with (folder / "said").open("w+") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
            try:
                code = process.wait(_PATIENCE_S)
            except BaseException:  # also Ctrl-C, which a session of its own doesn't hear
                os.killpg(process.pid, signal.SIGKILL)
                raise
            said.seek(0)
            if code:
                raise TrainingError(f"bench: {script} ended with {code}: {said.read()[-2000:]}")

    def _taken(self, case: Case, folder: Path) -> Taken:
        ranks = [json.loads((folder / f"clocks-{rank}.json").read_text()) for rank in range(case.processes)]
        launched = float((folder / "launched").read_text())
        shutil.rmtree(folder)
        return taken(ranks, launched, case.tokens_per_step)


def taken(ranks: Sequence[dict[str, Any]], launched: float, tokens_per_step: int) -> Taken:
    """What a run took, from what its ranks wrote down.

    Args:
        ranks: of each, `marks`: step, wall-clock and CPU seconds at each logged step; and more.
        launched: when the run was started, seconds since the epoch.
        tokens_per_step: of all ranks.
    """
    cpu_s, wall_s, steps = 0.0, [], 1
    for rank in ranks:
        marks = [mark for mark in rank["marks"] if mark[0] >= _WARMUP] or rank["marks"]
        (first, wall_before, cpu_before), (last, wall_after, cpu_after) = marks[0], marks[-1]
        steps = max(1, last - first)
        cpu_s += cpu_after - cpu_before
        wall_s.append(wall_after - wall_before)
    return Taken(
        cpu_ms_per_step=1000 * cpu_s / steps,
        tokens_per_s=tokens_per_step * steps / max(*wall_s, 1e-9),
        startup_s=max(rank["first_step_at"] for rank in ranks) - launched,
        peak_mib=max(rank["peak_mib"] for rank in ranks),
        loss=ranks[0]["loss"],
        saves_s=[max(each) for each in zip(*(rank.get("saves_s", []) for rank in ranks), strict=True)],
    )


def saves_of(events: Sequence[Any], step_s: dict[int, float]) -> Saves:
    """What the saves of a run took.

    Args:
        events: of checkpoints.
        step_s: seconds of each step.
    """
    overlapped: set[int] = set()
    for event in events:
        left, step = event["seconds"] - event["stall_s"], event["step"] + 1
        while left > 0 and step in step_s:
            if left > step_s[step] / 2:
                overlapped.add(step)
            left -= step_s[step]
            step += 1
    warm = sorted(step_s)[_FEW_STEPS:]
    quiet = [step_s[step] for step in warm if step not in overlapped]
    return Saves(
        seconds=[event["seconds"] for event in events],
        stalls_s=[event["stall_s"] for event in events],
        quiet_step_s=statistics.median(quiet),
        overlapped_step_s=statistics.fmean(step_s[step] for step in overlapped) if overlapped else None,
    )
