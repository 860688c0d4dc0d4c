"""A job in which nothing moves says who is missing, leaves its stacks and ends; one that is only slow goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from strategies.base import Batch, LossTerms
from strategies.testing import Workers
from strategies.world import World
from tests.faults.kit import workers_of
from tests.test_cli import launch, num_lines, started, wait_for
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import ROWS, TINY, Rows, fit
from trainer.bounded import within
from trainer.left_behind import see_off
from trainer.liveness import Liveness
from trainer.metrics.events import read_events
from trainer.pulse import PULSE
from trainer.rollcall import Answer, RollCall, missing, words
from trainer.standing import standing
from trainer.watchdog import Watchdog

ENDLESS = (*TINY, "trainer.max_steps=1000000", "run.dir=run", "trainer.hang_timeout=8")
STUCK = """
import sys, threading
sys.path[:0] = [{root!r}]
from trainer.data.loader import Loader
real = Loader.steps
def steps(self, position):
    for number, step in enumerate(real(self, position)):
        if number == 4 and self._keys.data_rank == 0:
            wait_for_a_file_server()
        yield step
def wait_for_a_file_server():
    threading.Event().wait()
Loader.steps = steps
from trainer import run
run()
"""


def said(folder: Path) -> list[str]:
    return [line for line in (folder / "err").read_text().splitlines() if line.startswith("TrainingError")]


def stacks(folder: Path, rank: int) -> str:
    return (folder / "run" / "logs" / f"rank-{rank}.log").read_text().partition("threads: ")[2]


# Real runs.


def test_stopped_worker_is_named_within_the_time_and_all_end(tmp_path: Path) -> None:
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path / "run") > 5, process)
        workers_of(process.pid)[1].suspend()
        begin = time.monotonic()
        wait_for(lambda: said(tmp_path) != [], process)
        named_s = time.monotonic() - begin
        assert process.wait(60) == 1
    assert named_s < 8 + 4, "the set time, and what a crowded machine needs to write a line"
    [line] = said(tmp_path)
    assert line.startswith("TrainingError: no progress for 8 s: rank 1 (")
    assert re.search(r"is stopped \(SIGSTOP\); the other rank is in (compute|data) after step \d+, waiting", line)
    assert "waiting in gloo:all_reduce" in line
    for rank in (0, 1):
        assert "MainThread" in stacks(tmp_path, rank)
    assert re.search(r" in (forward_backward|step|log|next_step)\n", stacks(tmp_path, 0)), (
        "where the loop waits for others"
    )
    assert '"gloo:all_reduce"' in (tmp_path / "run" / "logs" / "collectives-rank-0.json").read_text()
    [*_, end] = read_events(tmp_path / "run")
    assert (end["event"], end["outcome"]) == ("end", "failed")
    assert "rank 1" in end["reason"]


def test_rank_stuck_in_its_data_is_named_with_its_line_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STUCK.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with started(*torchrun, "script.py", *ENDLESS, folder=tmp_path) as process:
        assert process.wait(120) == 1
    [line] = said(tmp_path)
    assert "rank 0 (" in line
    assert "is missing there, and is in data after step 4, at script.py:" in line
    assert "in wait_for_a_file_server" in stacks(tmp_path, 0)


@dataclass(kw_only=True)
class Slow(Rows):
    """Takes longer for a step, and for an evaluation, than it may stand still."""

    pause_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hang_timeout = 3.0  # shorter than anybody may say

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        time.sleep(self.pause_s)
        return super().loss(outputs, batch)


def fit_slowly(folder: str, overrides: list[str]) -> dict[str, Any]:
    return fit(folder, overrides, Slow)


def test_healthy_run_that_is_slow_goes_on(workers: Workers, tmp_path: Path) -> None:
    slow = ("trainer.pause_s=1.1", "trainer.max_steps=2", "trainer.eval_every=null")
    answers = workers.run(fit_slowly, 2, str(tmp_path / "run"), [*ROWS, *slow], timeout=100)
    assert [answer["progress"]["step"] for answer in answers] == [2, 2]
    assert "no progress" not in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


ALONE = """
import ctypes, sys, threading
from pathlib import Path
import torch, torch.distributed as dist
from strategies.world import World
from trainer import watchdog
from trainer.liveness import Liveness
from trainer.metrics.logs import set_up_logs
from trainer.pulse import PULSE
watchdog._STUCK_S = 0.5
set_up_logs(Path("run"), 0)
with Liveness(World(device=torch.device("cpu"), store=dist.HashStore()), Path("run"), 1, 1.0):
    PULSE.stepped(3)
    {wait}
"""


@pytest.mark.parametrize(
    ("wait", "line"),
    [
        ("threading.Event().wait()", "TrainingError: no progress for 1 s: rank 0 ("),
        ("ctypes.PyDLL(None).sleep(60)", None),  # holds the interpreter: C alone can still do something
    ],
)
def test_process_alone_that_hangs_ends_with_its_stacks(tmp_path: Path, wait: str, line: str | None) -> None:
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", ALONE.format(wait=wait)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=50, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.startswith(line or "")
    assert 'File "<string>", line' in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_watching_costs_next_to_nothing(tmp_path: Path) -> None:
    """0.5 % of a process that computes all the time; two of its threads, over some seconds."""
    (tmp_path / "logs").mkdir()
    store, seconds = dist.HashStore(), 4.0
    store.set("live/1/1", f'["{Path("/proc/sys/kernel/hostname").read_text().strip()} elsewhere", 1]')
    world = World(rank=0, size=2, data_size=2, local_size=2, device=torch.device("cpu"), store=store)
    with Liveness(world, tmp_path, 1, 900.0) as watch:
        time.sleep(1)
        ids = [thread.native_id for thread in watch._threads]
        before = sum(_cpu_s(number) for number in ids)
        time.sleep(seconds)
        spent = sum(_cpu_s(number) for number in ids) - before
    assert len(ids) == 2
    assert 0 < spent < 0.005 * seconds


def _cpu_s(thread: int | None) -> float:
    return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) / 1e9


# How long nothing happened.


def watchdog(tmp_path: Path, timeout_s: float | None = 100.0) -> Watchdog:
    PULSE.begin()
    found = Watchdog(World(device=torch.device("cpu"), store=dist.HashStore()), tmp_path, timeout_s)
    found.begin(threading.get_ident())
    return found


def test_time_asleep_doesnt_count(tmp_path: Path) -> None:
    dog, begin = watchdog(tmp_path), time.monotonic()
    with mock.patch("trainer.watchdog.time.monotonic") as clock:
        for clock.return_value in (begin + 1, begin + 2, begin + 3602, begin + 3603):
            idle = dog.idle_s()
        assert idle == pytest.approx(3, abs=0.5), "the hour in which the lid was closed"
        PULSE.beat()
        assert dog.idle_s() == 0


def test_end_disarms_for_good(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with mock.patch("trainer.watchdog.faulthandler") as library:
        dog = watchdog(tmp_path)
        assert library.dump_traceback_later.call_args.kwargs["exit"] is True
        dog.end()
        dog.stay_awake()  # by the thread that keeps the time, which may be late
    assert [call[0] for call in library.method_calls] == ["dump_traceback_later", "cancel_dump_traceback_later"]


def test_what_is_only_done_once_may_take_longer(tmp_path: Path) -> None:
    dog = watchdog(tmp_path)
    assert dog.limit_s() == 400
    PULSE.stepped(1)
    assert dog.limit_s() == 100
    PULSE.finishing("delivering")
    assert dog.limit_s() == 400
    assert watchdog(tmp_path, None).limit_s() is None


def test_debugged_process_isnt_hung(tmp_path: Path) -> None:
    dog, begin = watchdog(tmp_path), time.monotonic()
    PULSE.stepped(1)
    dog.idle_s()
    with mock.patch("trainer.watchdog.time.monotonic") as clock:
        for second in range(102):
            clock.return_value = begin + second
            dog.idle_s()
        assert (dog.alone([], 0.0) or "").startswith("no progress for 101 s")
        namespace: dict[str, Any] = {"__name__": "pdb", "dog": dog}
        exec("found = dog.alone([], 0.0)", namespace)  # as from pdb's own loop
        assert namespace["found"] is None


# Who is missing.


def stands(**changes: Any) -> dict[str, Any]:
    return {
        "step": 7, "doing": "compute", "started": {"0": 12, "1": 8}, "entered": {}, "waits": "gloo:all_reduce 12",
        "at": "loop.py:1 in step", "debugged": False, "idle_s": 900.0, "host": "h", "stopped": [], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({0: stands(), 1: None, 2: stands()}, [1]),
        ({0: stands(), 1: stands(started={"0": 11, "1": 8}), 2: stands()}, [1]),
        ({0: stands(), 1: stands(), 2: stands(started={"0": 12})}, [0, 1, 2]),  # not in group 1 at all
        ({0: stands(entered={"0": 12}), 1: stands(entered={"0": 11})}, [1]),  # its device hasn't come to it
        ({0: stands(), 1: stands(waits=None, doing="data")}, [1]),
        ({0: stands(waits="x"), 1: stands(waits="x", step=6)}, [1]),
        ({0: stands(started={"0": 5, "1": 8}), 1: stands(started={"0": 4, "1": 9})}, [0, 1]),  # out of step
    ],
)
def test_missing_are_those_whom_the_others_wait_for(answers: dict[int, Answer | None], expected: list[int]) -> None:
    assert missing(answers) == expected


def test_words_name_a_few_and_count_the_rest() -> None:
    answers: dict[int, Answer | None] = {rank: stands(stopped=[0, 1]) if rank > 8 else None for rank in range(64)}
    line = words(answers, {0: "red", 1: "blue"})
    assert line.startswith("rank 0 (red) is stopped (SIGSTOP), rank 1 (blue) is stopped (SIGSTOP), rank 2 (")
    assert "and 5 more; 55 of the 55 others are in compute after step 7, waiting in gloo:all_reduce 12" in line
    assert len(line) < 600


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def calls(store: Any, clock: Clock, size: int = 3) -> list[RollCall]:
    return [RollCall(store, "live/1", rank, size, silent_s=10, now=clock) for rank in range(size)]


def test_roll_call_hears_everybody_at_once_and_waits_for_one_that_is_silent() -> None:
    clock, store = Clock(), dist.HashStore()
    first, second, third = calls(store, clock)
    assert not second.is_on()
    assert first.ask()
    assert second.is_on()
    assert not second.ask(), "one asks"
    for _ in range(3):
        first.answer(stands())
        second.answer(stands())
        heard = first.hear()
        clock.now += 1
    assert heard is None, "the third has its time"
    for _ in range(2):
        third.answer(stands(step=6))
        heard = first.hear()
    assert heard is not None
    assert {rank: answer and answer["step"] for rank, answer in heard.items()} == {0: 7, 1: 7, 2: 6}
    for _ in range(12):
        clock.now += 1
        first.answer(stands())
        second.answer(stands())
        heard = first.hear()
    assert heard is not None
    assert [rank for rank, answer in heard.items() if answer is None] == [2], "it has fallen silent"
    first.withdraw()
    assert not second.is_on()


def test_roll_call_of_a_rank_that_is_stopped_needs_no_waiting() -> None:
    clock, store = Clock(), dist.HashStore()
    first, second, _ = calls(store, clock)
    first.ask()
    heard = None
    for _ in range(3):
        first.answer(stands())
        second.answer(stands(stopped=[2]))
        heard = first.hear()
    assert heard is not None
    assert heard[2] is None


def test_roll_call_goes_on_where_the_one_who_asks_falls_silent() -> None:
    clock, store = Clock(), dist.HashStore()
    first, second, _ = calls(store, clock)
    assert first.ask()
    first.answer(stands())
    assert not second.ask()
    clock.now += 11
    assert not second.ask()
    assert second.ask()


def test_standing_says_what_of_other_ranks_it_waits_for() -> None:
    PULSE.begin()
    main, nothing = threading.get_ident(), dict[str, Any]()
    with PULSE.waiting("the next step's counts"):
        found = within(10, lambda: standing(main), nothing)
    assert found["waits"] == "the next step's counts"
    assert found["at"].startswith(("test_watchdog.py:", "bounded.py:"))
    assert standing(threading.get_ident())["waits"] is None
    assert PULSE.waited_s > 0


# A torchrun that waits for a machine that is gone.


@pytest.mark.parametrize("condition", ["deaf", "ends by itself", "has started again"])
def test_launcher_is_seen_off_if_it_stays_without_workers(condition: str) -> None:
    code = {
        "deaf": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        "ends by itself": "import time; time.sleep(0.2)",
        "has started again": "import subprocess; subprocess.run(['sleep', '60'])",
    }[condition]
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) as launcher:
        time.sleep(0.5 if condition == "has started again" else 0)
        see_off(launcher.pid, by_itself_s=1.0, after_sigterm_s=0.5)
        time.sleep(0.2)
        try:
            code_found = launcher.wait(4)
        except subprocess.TimeoutExpired:
            code_found = None
        for child in psutil.Process(launcher.pid).children() if code_found is None else []:
            child.kill()
        launcher.kill()
    assert code_found == {"deaf": -9, "ends by itself": 0, "has started again": None}[condition]
