"""Nodes of a job as containers: several processes each; and one that is killed, after which all go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY
from tests.trainer.launch.test_kubernetes_jobs import free_port

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="takes two minutes: set SHARDWRIGHT_CLUSTER=all"
    ),
    pytest.mark.timeout(900),
]


KEPT = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
NODE = [sys.executable, "-c", "from trainer.cli import main; main()", "node"]


def close(process: subprocess.Popen[bytes]) -> None:
    for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
        each.kill()
    process.wait()


def test_killed_node_is_met_again_and_the_run_goes_on(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    words = [*TINY, "trainer.max_steps=100000", "trainer.micro_batch=1", "checkpoint.every=3", f"run.dir={run}"]
    with ExitStack() as stack:

        def begin(node: int) -> subprocess.Popen[bytes]:
            operator = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "localhost"}
            command = [*NODE, "--processes=1", *words]
            with (tmp_path / f"node-{node}").open("a") as log:
                made = subprocess.Popen(
                    command, env={**KEPT, **operator, "PET_MASTER_PORT": str(port)}, stdout=log, stderr=log
                )
            stack.callback(close, made)
            return made

        def until(condition: Callable[[], bool], seconds: float = 240) -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert time.monotonic() < end, [(tmp_path / f"node-{node}").read_text()[-2000:] for node in (0, 1)]
                time.sleep(0.1)

        def events(kind: str) -> list[dict[str, Any]]:
            path = run / "events.jsonl"
            found = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
            return [each for each in found if each["event"] == kind]

        nodes = [begin(0), begin(1)]
        until(lambda: len(events("checkpoint")) >= 2)
        [worker] = psutil.Process(nodes[1].pid).children()
        worker.kill()
        assert nodes[1].wait(60) == 137
        began = time.monotonic()
        nodes[1] = begin(1)  # at once: the other one still is what it was
        assert nodes[0].wait(90) not in (0, 2, 75)
        print(f"the other node ended {time.monotonic() - began:.1f} s later")
        nodes[0] = begin(0)
        saved = events("checkpoint")[-1]["step"]
        until(lambda: len(events("checkpoint")) > 0 and events("checkpoint")[-1]["step"] >= saved + 3)
        assert [(each["step"], each["world_size"]) for each in events("start")] == [(0, 2), (saved, 2)]
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        assert [node.wait(60) for node in nodes] == [75, 75]
        assert events("end")[-1]["reason"] == "stopped by SIGTERM"


def test_two_nodes_of_batch_with_two_processes_each_train_together(tmp_path: Path) -> None:
    words = [*TINY, "trainer.global_batch=16", "trainer.max_steps=3", f"run.dir={tmp_path / 'run'}"]
    with ExitStack() as stack:
        nodes = []
        for node in (1, 0):
            batch = {
                "AWS_BATCH_JOB_NUM_NODES": "2",
                "AWS_BATCH_JOB_NODE_INDEX": str(node),
                "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
            }
            if node:
                batch["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"] = "127.0.0.1"
            with (tmp_path / f"node-{node}").open("w") as log:
                nodes.append(
                    subprocess.Popen([*NODE, "--processes=2", *words], env={**KEPT, **batch}, stdout=log, stderr=log)
                )
            stack.callback(close, nodes[-1])
        codes = [each.wait(240) for each in nodes]
    said = (tmp_path / "node-0").read_text()
    assert codes == [0, 0], said
    assert "4 processes, 2 on this machine" in said
    assert (tmp_path / "node-1").read_text() == ""
