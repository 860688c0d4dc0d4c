"""horovodrun's elastic mode: a worker is killed and the run goes on from the last commit; and each part of that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from strategies import _horovod_rejoin
from strategies._horovod_elastic import HorovodElastic
from strategies._horovod_memory import Memory, kinds_of
from strategies.backends import Backend, GlooBackend, connect_ranks
from strategies.elastic import Elastic
from strategies.single import SingleStrategy
from strategies.testing import Workers
from strategies.world import World
from tests.trainer.jobs import ROWS, curve, fit, lines, losses

ROOT = Path(__file__).parents[2]
HERE = Path(sys.executable).parent
JOB = (*ROWS, "trainer.max_steps=12")

installed = pytest.mark.skipif(
    find_spec("horovod") is None, reason="Horovod isn't installed (scripts/install_horovod.sh)"
)


@pytest.fixture(scope="module")
def alone(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    [ended] = workers.run(fit, 1, str(folder), [*JOB, "strategy=single"], "Rows")
    assert ended["progress"]["step"] == 12
    return losses(folder)


# The whole of it.


@pytest.mark.horovod
@installed
def test_run_goes_on_from_the_last_commit_when_rank_0_is_killed_and_another_joins(
    alone: list[float], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(HERE), os.environ.get("PATH", os.defpath)])
    program = shutil.which("horovodrun", path=path)
    assert program is not None
    hosts, run = tmp_path / "hosts.sh", tmp_path / "run"
    # Names of this machine are as many hosts: where a worker is lost, horovodrun gives up its host.
    hosts.write_text(f"#!/bin/sh\necho localhost:1; [ ! -e {run}/happened ] || echo $(hostname):1\necho 127.0.0.1:1\n")
    hosts.chmod(0o755)
    ended = subprocess.run(
        [program, "-np", "2", "--min-np", "2", "--host-discovery-script", str(hosts), "--network-interfaces", "lo",
         sys.executable, "tests/strategies/elastic_worker.py", *JOB, "strategy=horovod_elastic",
         "strategy.commit_every=4", "hooks=fate", "hooks.fate.victim=0", f"run.dir={run}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-5000:]
    assert "going on from the last commit, in memory (step 4)" in said
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 13))
    assert losses(run) == pytest.approx(alone, abs=5e-6)
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [(start["step"], start["last_seen_step"], start["world_size"]) for start in starts] == [(0, 0, 2), (4, 6, 2)]


# The loop.


class Rejoined(Exception):  # noqa: N818
    """Where a process would begin again."""


class Told(Elastic):
    """Of a lone rank that hears of others after a step; its memory is a dictionary."""

    def __init__(self, after: int) -> None:
        super().__init__(commit_every=4)
        self.after, self.kept, self.steps = after, dict[str, Any](), list[int]()

    def commit(self, step: int, note: str, tensors: Any) -> None:
        self.steps.append(step)
        self.kept = {"note": note, "tensors": {name: value.detach().clone() for name, value in tensors.items()}}

    def committed(self) -> tuple[str, dict[str, Tensor]] | None:
        return (self.kept["note"], self.kept["tensors"]) if self.kept else None

    def changed(self) -> bool:
        return self.steps[-1:] == [self.after]

    def rejoin(self, why: str) -> None:
        raise Rejoined(why)


def fit_with(elastic: Told, folder: str, words: list[str]) -> str:
    """Why it began again; empty: it came to its end."""
    connect = SingleStrategy.connect

    def connected(self: SingleStrategy, backend: Backend) -> World:
        return replace(connect(self, backend), elastic=elastic)

    with mock.patch.object(SingleStrategy, "connect", connected):
        try:
            fit(folder, words, "Rows")
        except Rejoined as error:
            return str(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return ""


def leave_and_go_on(folder: str) -> tuple[str, list[int], str, list[int]]:
    words = [*JOB, "strategy=single", "trainer.ema_decay=0.9", "resume=never", "checkpoint.every=3"]
    elastic = Told(after=8)
    first, steps = fit_with(elastic, folder, words), elastic.steps
    elastic.steps, elastic.after = [], -1
    return first, steps, fit_with(elastic, folder, words), elastic.steps


def test_run_leaves_at_a_commit_when_hosts_change_and_goes_on_from_it(workers: Workers, tmp_path: Path) -> None:
    words = [*JOB, "strategy=single", "trainer.ema_decay=0.9"]
    workers.run(fit, 1, str(tmp_path / "whole"), words, "Rows")
    [(why, steps, again, more)] = workers.run(leave_and_go_on, 1, str(tmp_path / "parts"))
    assert (why, again) == ("the hosts have changed", "")
    assert steps[:3] == [0, 4, 8]
    assert more == [steps[-1], 12]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


# The memory.


def newest_commit(mine: list[int | None]) -> tuple[str, list[float], int]:
    """What this rank gets where rank `r` has a commit of step `mine[r]`, and the step that it has afterwards."""
    world = connect_ranks(GlooBackend(timeout_s=60))
    elastic, step = HorovodElastic(1), mine[world.rank]
    if step is not None:
        elastic.commit(
            step, f"step {step}", {"a": torch.full((3, 2), float(step)), "b": torch.tensor(step), "c": torch.empty(0)}
        )
    elastic.met(world)
    found = elastic.committed()
    assert found is not None
    kept = elastic._memory.read()
    dist.destroy_process_group()
    assert kept is not None
    return found[0], [*found[1]["a"].view(-1).tolist(), found[1]["b"].item()], kept[0][0]


@pytest.mark.horovod
@installed
@pytest.mark.parametrize("mine", [(6, 6, 6), (4, None, 6), (None, 2, None)])
def test_all_ranks_get_the_newest_commit(workers: Workers, mine: tuple[int | None, ...]) -> None:
    newest = max(step for step in mine if step is not None)
    for found in workers.run(newest_commit, 3, list(mine), timeout=60):
        assert found == (f"step {newest}", [float(newest)] * 6 + [newest], newest)


def test_memory_is_found_again_by_its_number_and_what_is_incomplete_is_not() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(2)}
    memory = Memory()
    assert memory.read() is None
    for name, place in memory.places(kinds_of(tensors)).items():
        place.copy_(tensors[name])
    assert Memory(memory.number).read() is None
    memory.note(["a note"])
    found = Memory(memory.number).read()
    assert found is not None
    assert found[0] == ["a note"]
    assert all(torch.equal(found[1][name], value) for name, value in tensors.items())
    memory.places(kinds_of(tensors))
    assert Memory(memory.number).read() is None
    os.close(memory.number)


# The way back in.


@contextmanager
def answering(text: str) -> Iterator[dict[str, str]]:
    """Variables of a worker whose horovodrun answers so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/rank_and_size/node1:2"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        who = {"HOROVOD_HOSTNAME": "node1", "HOROVOD_LOCAL_RANK": "2", "HOROVOD_RANK": "7"}
        try:
            yield {**who, "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
                   "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_address[1])}  # fmt: skip
        finally:
            server.shutdown()


def rejoin(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    worker = "import os; print(*(os.environ['HOROVOD_' + name] for name in ('RANK', 'SIZE', 'LOCAL_RANK')))"
    return subprocess.run(
        [sys.executable, _horovod_rejoin.__file__, "-c", worker],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_worker_is_started_again_as_who_it_is_now() -> None:
    with answering("1,4,0,1,1,4") as variables:
        ended = rejoin(variables)
    assert (ended.returncode, ended.stdout) == (0, "1 4 0\n")


def test_worker_that_horovodrun_gave_up_leaves() -> None:
    with answering("-1,-1,-1,-1,-1,-1") as variables:
        ended = rejoin(variables)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.startswith("node1:2 is no longer part of the run")


def test_worker_without_horovodrun_ends_with_one_line() -> None:
    with answering("") as variables:
        pass
    ended = rejoin(variables)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("horovodrun doesn't say who node1:2 is now")
