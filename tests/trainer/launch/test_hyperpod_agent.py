"""AWS's own HyperPod agent starts what a manifest says, as its operator tells it to: two nodes, then one, then none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY
from tests.trainer.launch.cluster import command_of
from tests.trainer.launch.environments import NEEDS, environment
from tests.trainer.launch.test_kubernetes_jobs import free_port, shardwright
from tests.trainer.launch.test_kubernetes_manifest import IMAGE, container
from trainer.commands.launch import SCRIPT
from trainer.launch import KubernetesLauncher, LaunchJob
from trainer.launch.kubernetes_parts import HyperPod, Kind

pytestmark = [NEEDS, pytest.mark.timeout(900)]

AGENT = "hyperpod-elastic-agent==1.1.3"
PLACE = Path("/opt/ml")
"""Where the agent writes addresses, whatever it is told."""
RUN_AGENT = """#!{python}
# The agent wants torch before 2.12, which has options of the same names as the agent's; nothing else is different.
import sys
from torch.distributed import run
made = run.get_args_parser
def parser():
    found = made()
    found.conflict_handler = found._optionals.conflict_handler = "resolve"
    return found
run.get_args_parser = parser
from hyperpod_elastic_agent.run import main
sys.exit(main())
"""


class Pod:
    """One agent, and what the operator says to it."""

    def __init__(self, command: list[str], variables: dict[str, str], log: Path) -> None:
        self.port, self.log = free_port(), log
        more = [f"--server-port={self.port}", "--server-host=127.0.0.1"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [command[0], *more, *command[1:]], env=variables, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent
            )

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    @property
    def state(self) -> str:
        try:
            return str(self.ask("/status")["status"])
        except OSError:
            return "away"

    def workers(self) -> list[psutil.Process]:
        """The training processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "trainer.max_steps=100000" in child.cmdline()]

    def close(self) -> None:
        for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            each.kill()
        self.process.wait()


def until(condition: Callable[[], bool], pods: list[Pod], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        for pod in pods:
            assert pod.process.poll() is None, pod.log.read_text()[-3000:]
        assert time.monotonic() < end, pods[0].log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.fixture
def place() -> Iterator[None]:
    there = PLACE.exists()
    if not os.access(PLACE if there else PLACE.parent, os.W_OK):
        pytest.skip(f"HyperPod's agent must be able to write to {PLACE}")
    yield
    if not there:
        shutil.rmtree(PLACE)


@pytest.mark.usefixtures("place")
def test_elastic_job_goes_on_with_fewer_nodes_and_a_hanging_one_is_seen(tmp_path: Path) -> None:
    python = environment(("fastapi", "uvicorn", "psutil"), (AGENT,), with_ours=True)
    run = tmp_path / "run"
    words = (*TINY, "trainer.max_steps=100000", "trainer.micro_batch=1", f"run.dir={run}")
    launcher = KubernetesLauncher(
        kind=Kind.hyperpod, image=IMAGE, gpus=0, nodes=2, grace="60s", volumes={"all": f"claim:{tmp_path}"},
        hyperpod=HyperPod(min_nodes=1, start_time="4m", hang_time="20s"),
    )  # fmt: skip
    job = LaunchJob(name="x", script=SCRIPT, overrides=words)
    launcher.check([job])
    manifest = yaml.safe_load(yaml.safe_dump(launcher.manifest(job)))
    rules = manifest["spec"]["runPolicy"]["logMonitoringConfiguration"]
    programs, master = shardwright(tmp_path / "bin"), free_port()
    (programs / "hyperpodrun").write_text(RUN_AGENT.format(python=python))
    (programs / "hyperpodrun").chmod(0o755)
    command, variables = command_of(container(manifest), {"NNODES": "2"})
    kept = {"HOME": os.environ["HOME"], "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    variables = {**kept, **variables, "OMP_NUM_THREADS": "1"}

    def start(pod: Pod, rank: int, nodes: int, faults: int) -> None:
        where = {"master_addr": "127.0.0.1", "master_port": str(master + faults)}
        numbers = {"rank": rank, "nnodes": nodes, "faultCount": faults}
        pod.ask("/start", {**numbers, **where, "log_monitoring_configuration": rules, "progress": {}})

    def steps() -> int:
        path = run / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
        return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0

    def events(kind: str) -> list[dict[str, Any]]:
        found = map(json.loads, (run / "events.jsonl").read_text().splitlines())
        return [each for each in found if each["event"] == kind]

    with ExitStack() as stack:
        pods = []
        for number in (0, 1):
            pods.append(Pod(command, variables, tmp_path / f"pod-{number}"))
            stack.callback(pods[-1].close)
        until(lambda: all(pod.state == "ready" for pod in pods), pods)
        for rank, pod in enumerate(pods):
            start(pod, rank, 2, 0)
        until(lambda: steps() > 5, pods)

        for pod in pods:  # as the operator does before nodes come or go
            pod.ask("/stop", {"is_graceful": True, "timeout": 60})
        until(lambda: all(pod.state == "ready" for pod in pods), pods)
        stopped = steps()
        assert events("end")[-1]["reason"] == "stopped by SIGUSR1"
        assert events("checkpoint")[-1]["step"] == stopped
        start(pods[0], 0, 1, 1)
        until(lambda: steps() > stopped + 5, pods)
        assert [(each["step"], each["world_size"]) for each in events("start")] == [(0, 2), (stopped, 1)]
        assert pods[0].state == "running", "its lines were seen"

        [worker] = pods[0].workers()
        worker.send_signal(signal.SIGSTOP)
        until(lambda: pods[0].state == "faulted", pods)
        assert pods[0].ask("/status")["reason"] == "LogHang_Steps"
        worker.send_signal(signal.SIGCONT)
        before = steps()
        pods[0].process.send_signal(signal.SIGTERM)  # as a kubelet does with a pod that is deleted
        psutil.wait_procs([worker], timeout=60)
        assert events("checkpoint")[-1]["step"] >= before
        assert events("end")[-1]["reason"] == "stopped by SIGTERM"
