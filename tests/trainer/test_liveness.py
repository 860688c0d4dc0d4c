"""A rank that dies: the others end with one line, wherever they wait; and nobody ends for less."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from strategies.testing import Workers
from strategies.world import World
from tests.faults.kit import workers_of
from tests.test_cli import launch, num_lines, started, starts, wait_for
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import ROWS, TINY, fit
from trainer.liveness import Liveness
from trainer.metrics.events import read_events
from trainer.peers import this_machine

ENDLESS = (*TINY, "trainer.max_steps=1000000", "checkpoint.every=20", "run.dir=run")

HANG = """
import sys, time
sys.path[:0] = [{root!r}]
from strategies.ddp import DDPStrategy
real, calls = DDPStrategy.forward_backward, 0
def hang(self, *args):
    global calls
    calls += 1
    if calls == 5 and self._connected.rank == 0:
        while True:
            time.sleep(1)  # as in a collective of NCCL: nothing comes back
    return real(self, *args)
DDPStrategy.forward_backward = hang
from trainer import run
run()
"""

CLOSING = """
import sys, time
sys.path[:0] = [{root!r}]
from trainer.observer import Observer
real = Observer.close
def slow(self, error=None):
    if error is not None:
        time.sleep(7)  # as a logger that sends its last lines
        open("closed", "w").close()
    real(self, error)
Observer.close = slow
from trainer import run
run()
"""

OUT_OF_MEMORY = """
import sys
sys.path[:0] = [{root!r}]
import torch
from strategies.ddp import DDPStrategy
real, calls = DDPStrategy.forward_backward, 0
def greedy(self, *args):
    global calls
    calls += 1
    if calls == 5 and self._connected.rank == 1:
        torch.empty(1 << 50)
    return real(self, *args)
DDPStrategy.forward_backward = greedy
from trainer import run
run()
"""


def said(folder: Path) -> list[str]:
    return [line for line in (folder / "err").read_text().splitlines() if line.strip()]


def script(folder: Path, text: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(text.format(root=str(ROOT)))
    return ["--script", str(path)]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other_with_one_line(tmp_path: Path, victim: int) -> None:
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path / "run") > 5, process)
        workers_of(process.pid)[victim].kill()
        begin = time.monotonic()
        assert process.wait(60) == 137
    assert time.monotonic() - begin < 30
    [line] = said(tmp_path)
    assert line.startswith(f"TrainingError: rank {victim} is gone")
    assert f"rank-{victim}.log" in line
    assert "[rank" not in (tmp_path / "out").read_text()


def test_killed_rank_ends_one_that_hangs(tmp_path: Path) -> None:
    with started(*launch(*script(tmp_path, HANG), *ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path / "run") == 4, process)
        workers_of(process.pid)[1].kill()
        begin = time.monotonic()
        assert process.wait(60) == 137
    assert time.monotonic() - begin < 20, "the launcher's own patience is 30 s"
    [line] = said(tmp_path)
    assert line.startswith("TrainingError: rank 1 is gone")


def test_killed_rank_leaves_the_other_time_to_close(tmp_path: Path) -> None:
    with started(*launch(*script(tmp_path, CLOSING), *ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path / "run") > 4, process)
        workers_of(process.pid)[1].kill()
        assert process.wait(60) == 137
    assert (tmp_path / "closed").exists()
    [line] = said(tmp_path)
    assert line.startswith("TrainingError: rank 1 is gone")


@pytest.mark.parametrize("other_s", [0, 60])
def test_killed_before_anybody_watches_is_said_by_the_launcher(tmp_path: Path, other_s: int) -> None:
    path = tmp_path / "script.py"
    path.write_text(f"import os, time\ntime.sleep(60 if os.environ['RANK'] == '1' else {other_s})\n")
    with started(*launch("--script", str(path)), folder=tmp_path) as process:
        wait_for(lambda: 1 in workers_of(process.pid), process)
        workers_of(process.pid)[1].kill()
        begin = time.monotonic()
        assert process.wait(60) == 137
    assert time.monotonic() - begin < 20
    [line] = said(tmp_path)
    assert line.startswith("TrainingError: rank 1 was ended by SIGKILL")


def test_killed_launcher_leaves_a_checkpoint_and_the_next_start_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(run) > 25, process)
        workers = list(workers_of(process.pid).values())
        process.kill()
        with started(*launch(*ENDLESS), folder=tmp_path) as again:  # at once: it waits for the orphans
            assert not psutil.wait_procs(workers, timeout=30)[1]
            wait_for(lambda: len(starts(run)) == 2, again)
    events = [event for event in read_events(run) if event["event"] in ("start", "end")]
    assert [event["event"] for event in events] == ["start", "end", "start"]
    assert events[2]["step"] == events[1]["step"] > 25


def test_launcher_killed_at_the_start_takes_the_ranks_with_it(tmp_path: Path) -> None:
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: len(psutil.Process(process.pid).children()) == 2, process)
        workers = psutil.Process(process.pid).children()
        time.sleep(0.5)
        process.kill()
        assert not psutil.wait_procs(workers, timeout=28)[1]


def test_frozen_rank_is_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(run) > 5, process)
        worker = workers_of(process.pid)[1]
        worker.suspend()
        time.sleep(6)
        seen = num_lines(run)
        worker.resume()
        wait_for(lambda: num_lines(run) > seen + 5, process)
        process.terminate()
        assert process.wait(60) == 75


def test_rank_out_of_memory_says_what_to_try(tmp_path: Path) -> None:
    with started(*launch(*script(tmp_path, OUT_OF_MEMORY), *ENDLESS), folder=tmp_path) as process:
        begin = time.monotonic()
        assert process.wait(90) == 1
    [line] = said(tmp_path)
    assert line.startswith("TrainingError: rank 1: out of memory: ")
    assert "trainer.micro_batch" in line
    assert time.monotonic() - begin < 60
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_before_the_loop_leaves_at_once(tmp_path: Path, name: str) -> None:
    code = (
        "import os; from trainer.stop import leaving_at_once\n"
        "import torch.distributed as d\n"
        "with leaving_at_once(os.getppid()):\n"
        "    print('ready', flush=True)\n"
        "    d.HashStore().wait(['never'], __import__('datetime').timedelta(seconds=60))\n"  # waits in C++
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - begin < 5
    assert err.strip() == f"{name}: nothing to save yet; the same command begins again"


def test_run_listens_on_loopback_only(tmp_path: Path) -> None:
    with started(*launch(*ENDLESS), folder=tmp_path) as process:
        wait_for(lambda: num_lines(tmp_path / "run") > 2, process)
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        places = [entry.laddr.ip for one in everyone for entry in one.net_connections() if entry.status == "LISTEN"]
    assert len(places) >= 3, "nothing listens: then how do the ranks talk?"
    assert set(places) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


# Other machines, as far as one machine can show them.


def far_world(rank: int, store: Any) -> World:
    """Two machines of one rank each."""
    return World(
        rank=rank, local_rank=0, size=2, local_size=1, data_rank=rank, data_size=2, device=torch.device("cpu"),
        store=store,
    )  # fmt: skip


def test_silent_machine_is_gone_and_a_slow_one_isnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.liveness._BEAT_GONE_S", 0.3)
    monkeypatch.setenv("RANK", "0")
    store = dist.HashStore()
    with mock.patch("trainer.liveness.threading.Thread"):  # looked at by hand, below
        watch = Liveness(far_world(0, store), tmp_path, 1)
        watch.__enter__()
    store.set("live/1/1", json.dumps(["elsewhere", 1]))
    for count in range(5):
        store.set("live/1/beat/1", str(count))
        watch._look()
        time.sleep(0.15)
    assert watch._verdict is None
    watch._look()
    time.sleep(0.4)
    watch._look()
    assert watch._verdict is not None
    assert watch._verdict.startswith("rank 1 is gone")
    assert store.get("live/1/beat/0") == b"7", "its own sign of life"


def test_machine_that_left_in_order_isnt_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.liveness._BEAT_GONE_S", 0.1)
    store = dist.HashStore()
    with mock.patch("trainer.liveness.threading.Thread"):
        watch = Liveness(far_world(0, store), tmp_path, 1)
        watch.__enter__()
    store.set("live/1/1", json.dumps([this_machine(), 2**22 + 1]))  # no such process
    store.set("live/1/left/1", "")
    watch._look()
    assert watch._verdict is None


@pytest.mark.parametrize("condition", ["killed", "left", "container", "alive"])
def test_process_of_this_machine_is_gone_only_if_seen_to_be(tmp_path: Path, condition: str) -> None:
    store = dist.HashStore()
    with mock.patch("trainer.liveness.threading.Thread"):
        watch = Liveness(dataclasses.replace(far_world(0, store), local_size=2), tmp_path, 1)
        watch.__enter__()
    with subprocess.Popen(["sleep", "60"]) as peer:
        machine = "another pid namespace" if condition == "container" else this_machine()
        store.set("live/1/1", json.dumps([machine, peer.pid]))
        watch._look()
        if condition != "alive":
            peer.kill()  # and stays a zombie while nobody waits for it
        if condition == "left":
            store.set("live/1/left/1", "")
        time.sleep(0.2)
        watch._look()
        peer.kill()
    assert (watch._verdict is not None) == (condition == "killed")


def test_ranks_on_two_machines_end_in_order(workers: Workers, tmp_path: Path) -> None:
    """A run whose ranks each pretend to be alone on their machine: beats are exchanged, and nobody is missed."""
    answers = workers.run(fit, 2, str(tmp_path / "run"), list(ROWS), "Rows", timeout=60, local_size=1)
    assert [answer["progress"]["step"] for answer in answers] == [10, 10]
