"""`launcher=slurm` on a real Slurm with two nodes: minutes long, since Slurm's time limits are."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.trainer.launch.slurm_lab import Lab, missing
from trainer.metrics.jsonl import objects

ROOT = Path(__file__).resolve().parents[3]
WHOLE = os.environ.get("SHARDWRIGHT_CLUSTER") == "all"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not WHOLE, reason="a real Slurm takes minutes: set SHARDWRIGHT_CLUSTER=all"),
    pytest.mark.skipif(WHOLE and bool(missing()), reason=f"a real Slurm {missing()}"),
]

STEPS = 600
PACED = ("launcher.time=3m", "launcher.stop_before=50s", "launcher.environment.PACE_S=0.25")
"""Slurm gives the signal up to a minute early, after some two minutes: too short for all steps, on any machine."""
SCRIPT = f'''"""A line through points; each step takes as long as PACE_S says. A file named `broken-N` breaks rank N."""
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from strategies.base import Batch, LossTerms
from trainer import Trainer
from trainer.cli import run
from trainer.data.base import Data


@dataclass(kw_only=True)
class Paced(Trainer):
    def make_model(self):
        return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))

    def make_data(self):
        rows = [torch.tensor([float(i)]) / 100 for i in range(100)]
        return Data(train=rows, validation=rows[:4])

    def collate(self, samples, seeds):
        inputs = torch.stack(samples)
        return Batch(inputs={{"input": inputs}}, labels=2 * inputs + 1, num_targets=len(samples))

    def loss(self, outputs, batch):
        time.sleep(float(os.environ.get("PACE_S", "0")))
        return LossTerms(loss=((outputs - batch.labels) ** 2).sum())


if __name__ == "__main__":
    if Path(f"broken-{{os.environ.get('SLURM_PROCID')}}").exists():
        os._exit(127)
    run(Paced, "trainer.max_steps={STEPS}", "trainer.log_every=1", "trainer.eval_every=null", "trainer.global_batch=2",
        "trainer.micro_batch=1", "logger=[]", "hooks=[]", "checkpoint.every=50")
'''


@dataclass
class Site:
    """A folder that all nodes see, and a cluster."""

    lab: Lab
    folder: Path
    commands: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def begin(self, name: str, *words: str, nodes: int = 2) -> subprocess.Popen[bytes]:
        """`shardwright launch`, following the run `name`; what it says goes into `<name>.out`."""
        given = ["launcher=slurm", f"launcher.nodes={nodes}", "launcher.processes=1", "--script", "paced.py"]
        if "--multirun" not in words:
            given += ["--name", name]
        with (self.folder / f"{name}.out").open("ab") as out:
            command = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "launch.py"), *given, *words],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.commands.append(command)
        return command

    def run(self, name: str, *words: str, nodes: int = 2, timeout_s: float = 300) -> tuple[int, str]:
        """The same to its end: exit code, and what it said."""
        return self.end(name, self.begin(name, *words, nodes=nodes), timeout_s)

    def end(self, name: str, command: subprocess.Popen[bytes], timeout_s: float = 300) -> tuple[int, str]:
        try:
            return command.wait(timeout_s), self.said(name)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said(name)) from None

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def losses(self, name: str) -> dict[int, float]:
        """Of each step of a run."""
        return {
            int(line["step"]): float(line["loss"]) for line in objects(self.folder / "runs" / name / "metrics.jsonl")
        }

    def wait_for_step(self, name: str, step: int) -> None:
        self.lab.wait_until(f"{name} is at step {step}", lambda: max(self.losses(name), default=0) >= step, 120)

    def wait_for(self, name: str, text: str, timeout_s: float = 120) -> None:
        self.lab.wait_until(f"{text!r} in {self.said(name)}", lambda: text in self.said(name), timeout_s)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Begins one, with a cluster of its own."""
    opened: list[object] = []

    @contextmanager
    def begun(**given: int) -> Iterator[Site]:
        (tmp_path / "paced.py").write_text(SCRIPT)
        with Lab(tmp_path / "slurm", **given).open() as lab:
            made = Site(lab, tmp_path)
            try:
                yield made
            finally:
                for command in made.commands:
                    if command.poll() is None:
                        command.kill()
                    command.wait()

    def begin(**given: int) -> Site:
        context = begun(**given)
        opened.append(context)
        return context.__enter__()

    yield begin
    for context in opened:
        context.__exit__(None, None, None)  # type: ignore[attr-defined]


def test_job_is_stopped_by_its_time_limit_requeued_and_ends_with_the_losses_of_one_in_one_piece(
    site: Callable[..., Site],
) -> None:
    here = site()
    begun = time.monotonic()
    timed = here.begin("timed", *PACED, "launcher.sbatch.comment='it is \"a\" #1'")
    whole, said = here.run("whole")
    assert whole == 0, said
    assert 'Comment=it is "a" #1' in here.lab.ask("scontrol", "show", "job")
    code, said = here.end("timed", timed, 900)
    assert code == 0, said
    assert said.count("SIGUSR1: stopping at the next step, with a checkpoint") >= 1
    assert said.count("launch: the time is up; the job waits to go on") >= 1
    assert said.count("started by srun: 2 processes, 1 on this machine") >= 2
    assert "going on from" in said
    assert here.losses("timed") == here.losses("whole")
    assert len(here.losses("whole")) == STEPS
    print(f"took {time.monotonic() - begun:.0f} s")


@pytest.mark.parametrize("node", [1, 0], ids=["the other one", "that of the script"])
def test_node_dies_and_the_job_is_requeued_and_goes_on(site: Callable[..., Site], node: int) -> None:
    here = site(miss_node_s=20)
    begun = time.monotonic()
    command = here.begin("struck", "launcher.environment.PACE_S=0.05")
    here.wait_for_step("struck", 120)
    here.lab.kill_node(here.lab.names[node])
    here.wait_for("struck", "started again 1 times", 180)
    print(f"requeued {time.monotonic() - begun:.0f} s after the start")
    assert command.poll() is None
    here.lab.start_node(here.lab.names[node])
    code, said = here.end("struck", command, 300)
    assert code == 0, said
    begins = [int(step) for step in re.findall(r"going on from \S+ \(step (\d+)\)", said)]
    assert len(begins) == 1, said
    assert begins[0] >= 100
    whole, said = here.run("whole")
    assert whole == 0, said
    assert here.losses("struck") == here.losses("whole")
    print(f"took {time.monotonic() - begun:.0f} s")


def test_grid_of_four_is_an_array_whose_jobs_are_requeued_one_by_one(site: Callable[..., Site]) -> None:
    here = site()
    begun = time.monotonic()
    words = ["--multirun", "--sweep-dir", "sweep", "optimizer.lr=1e-3,1e-2", "seed=1,2", "trainer.micro_batch=2"]
    command = here.begin("sweep", *words, *PACED, nodes=1)
    here.lab.wait_until(
        "four jobs run", lambda: len(here.lab.ask("squeue", "-h", "-t", "RUNNING").splitlines()) == 4, 180
    )
    assert "[0-3]" in here.lab.ask("scontrol", "show", "job") or "ArrayTaskId=3" in here.lab.ask(
        "scontrol", "show", "job"
    )
    code, said = here.end("sweep", command, 900)
    assert code == 0, said
    with (here.folder / "sweep" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 4, rows
    book = json.loads((here.folder / "sweep" / "sweep.json").read_text())
    handles = [each["handle"] for each in book["jobs"]]
    assert [handle.partition("_")[2] for handle in handles] == ["0", "1", "2", "3"]
    for handle in handles:
        log = (here.folder / "sweep" / "logs" / f"slurm-{handle}.log").read_text()
        assert log.count("the time is up; the job waits to go on") >= 1, log
        assert log.count("going on from") >= 1, log
    print(f"took {time.monotonic() - begun:.0f} s")


def test_job_that_is_told_to_stop_leaves_a_checkpoint_and_the_same_command_goes_on(site: Callable[..., Site]) -> None:
    here = site()
    command = here.begin("told", "launcher.environment.PACE_S=0.05")
    here.wait_for_step("told", 60)
    number = re.search(r"^job (\d+),", here.said("told"))
    assert number is not None
    other = here.begin("told", "trainer.max_steps=9")
    assert other.wait(60) == 2
    assert "is RUNNING, with other settings" in here.said("told")
    watcher = here.begin("told", "launcher.environment.PACE_S=0.05")
    here.lab.wait_until("the same command follows", lambda: here.said("told").count(f"job {number[1]}, log") == 2)
    here.lab.ask("scancel", "--signal=TERM", number[1])
    for each in (command, watcher):
        code, said = here.end("told", each)
        assert code == 75, said
    assert "SIGTERM: stopping at the next step, with a checkpoint" in said
    assert here.lab.ask("squeue", "--noheader").strip() == ""
    code, said = here.run("told")
    assert code == 0, said
    assert "going on from" in said
    assert sorted(here.losses("told")) == list(range(1, STEPS + 1))


def test_job_whose_place_is_taken_goes_on_later(site: Callable[..., Site]) -> None:
    here = site()
    command = here.begin("displaced", "launcher.environment.PACE_S=0.05")
    here.wait_for_step("displaced", 60)
    here.lab.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    code, said = here.end("displaced", command)
    assert code == 0, said
    assert said.count("launch: a job of higher priority takes its place; the job waits to go on") == 1
    assert said.count("going on from") == 1
    assert sorted(here.losses("displaced")) == list(range(1, STEPS + 1))


def test_job_that_is_cancelled_stays_so(site: Callable[..., Site]) -> None:
    here = site()
    command = here.begin("gone", "launcher.environment.PACE_S=0.05")
    here.wait_for_step("gone", 10)
    number = re.search(r"^job (\d+),", here.said("gone"))
    assert number is not None
    here.lab.ask("scancel", number[1])
    code, said = here.end("gone", command)
    assert code == 75, said
    assert "stopped: cancelled" in said
    time.sleep(20)
    assert here.lab.ask("squeue", "--noheader").strip() == ""


def test_failures_on_two_nodes_end_with_their_exit_code_and_reason(site: Callable[..., Site]) -> None:
    here = site()
    code, said = here.run("wrong", "trainer.max_steps=-1")
    assert code == 2, said
    assert said.count("ConfigError: ") >= 1
    (here.folder / "broken-1").touch()
    begun = time.monotonic()
    code, said = here.run("broken")  # the other rank waits for it, and would for days
    assert code not in (0, 2, 75), said
    assert time.monotonic() - begun < 240
    assert "Exited with exit code 127" in said
