"""Jobs of a cluster as kubectl gets and shows them, and a manifest's container that is really run."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from strategies.errors import ConfigError
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY as TINY_JOB
from tests.trainer.jobs import lines
from tests.trainer.launch.cluster import Cluster, command_of, pod
from tests.trainer.launch.test_kubernetes_manifest import IMAGE, container
from trainer.commands import COMMANDS
from trainer.commands.launch import SCRIPT
from trainer.launch import KubernetesLauncher, LaunchJob, State
from trainer.launch.following import follow_until_end
from trainer.launch.kubernetes_follow import Watch, follow
from trainer.launch.kubernetes_job import Kubectl, PodsJob, exit_code_of, status_of
from trainer.launch.kubernetes_manifest import log_rules
from trainer.launch.kubernetes_parts import HyperPod, Kind
from trainer.metrics.screen import PlainScreen

NEEDED = ("launcher=kubernetes", f"launcher.image={IMAGE}", "launcher.gpus=0", "launcher.namespace=training")
TINY = ("model=llama_tiny", "trainer.max_steps=2", "run.name=first_run")
JOB = LaunchJob(name="first_run", script=SCRIPT)
STEPS = ("started", "step=1/2 loss=5.5 lr=0.001 tokens_per_s=100", "step=2/2 loss=5.4 lr=0.001 tokens_per_s=120",
         "step=2 val_loss=5.3")  # fmt: skip


NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes\n are free"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder, programs = tmp_path / "cluster", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    made = Cluster(folder)
    made.install(programs)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SHARDWRIGHT_TEST_CLUSTER", str(folder))
    monkeypatch.setattr("trainer.launch.following.EVERY_S", 0.2)
    return made


def launch(*words: str) -> int:
    """As the command does it, in this process."""
    from trainer.cli import exit_code

    options = COMMANDS["launch"].parse([*NEEDED, *words])
    return exit_code(lambda: COMMANDS["launch"].run(options))


def submitted(name: str = "job", kind: Kind = Kind.pytorchjob) -> PodsJob:
    return PodsJob(JOB, name, kind, Kubectl("training", None))


def test_job_is_handed_over_and_followed_to_its_end(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.log(*STEPS)
    cluster.describe("Created", "Succeeded", pods=[pod("first-master-0", "Succeeded", 0)])
    assert launch(*TINY, "launcher.context=mine") == 0
    out = capsys.readouterr().out
    manifest = yaml.safe_load(cluster.applied)
    name = manifest["metadata"]["name"]
    assert out.splitlines()[0] == f"job {name}"
    assert "step=2/2 loss=5.4 lr=0.001" in out
    assert out.splitlines()[-1] == "finished"
    assert container(manifest)["args"] == ["--processes=1", *TINY]
    where = ["--context=mine", "--namespace=training"]
    resource = "pytorchjobs.kubeflow.org"
    assert cluster.asked[:2] == [
        [*where, "get", resource, "--selector=shardwright/run=first_run", "--output=json"],
        [*where, "apply", "--filename=-"],
    ]
    assert [*where, "get", f"{resource}/{name}", "--output=json"] in cluster.asked
    logs = [words for words in cluster.asked if "logs" in words]
    assert logs == [[*where, "logs", "first-master-0", "--container=pytorch", "--timestamps", "--follow"]]


@pytest.mark.parametrize(
    ("codes", "expected", "state"),
    [
        ([2, 2], 2, "failed"),
        ([75, 0], 75, "stopped"),
        ([75, 1], 1, "failed"),
        ([137, 1], 1, "failed"),
        ([1, 2], 2, "failed"),
    ],
)
def test_failed_job_ends_with_its_pods_code(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], codes: list[int], expected: int, state: str
) -> None:
    pods = [pod(f"first-worker-{number}", "Failed", code) for number, code in enumerate(codes)]
    cluster.log("ConfigError: data.paths is wrong")
    cluster.describe("Failed", pods=pods, message="2 replicas\n failed")
    assert launch(*TINY) == expected
    out = capsys.readouterr().out
    assert "ConfigError: data.paths is wrong" in out
    assert f"\n{state}: 2 replicas failed" in out
    assert exit_code_of(pods) == expected


def test_second_job_beside_one_that_runs_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    conditions = [{"type": "Running", "status": "True"}, {"type": "Failed", "status": "False"}]
    running = {"items": [{"metadata": {"name": "other"}, "status": {"conditions": conditions}}]}
    (cluster.folder / "others.json").write_text(json.dumps(running))
    assert launch(*TINY) == 2
    assert "the job other of the same run is still at work" in capsys.readouterr().err
    assert not (cluster.folder / "applied.yaml").exists()


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("error: You must be logged in to the server (Unauthorized)", "Log in again"),
        ('error: no matches for kind "PyTorchJob" in version "kubeflow.org/v1"', "install it, or use another"),
        ("Unable to connect to the server: connection refused", "kubectl cluster-info"),
        ("something else", "See what it says"),
    ],
)
def test_what_kubectl_says_is_one_line(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], said: str, fix: str
) -> None:
    cluster.fail(f"more\n{said}")
    assert launch(*TINY) == 2
    err = capsys.readouterr().err
    [line] = [line for line in err.splitlines() if line.startswith("ConfigError")]
    assert said.rstrip(".") in line
    assert fix in line


def test_launch_without_kubectl_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert launch(*TINY) == 2
    assert "kubectl isn't installed" in capsys.readouterr().err


def test_job_of_a_sweep_is_found_again_and_tells_its_numbers(cluster: Cluster) -> None:
    launcher = KubernetesLauncher(image=IMAGE, gpus=0)
    cluster.describe("Created", pods=[pod("a-worker-0", "Running"), pod("a-master-0", "Pending")])
    cluster.log(*STEPS)
    started = launcher.start(JOB)
    found = launcher.find(JOB, started.handle)
    assert found is not None
    status = found.status()
    assert status.state is State.running
    assert status.metrics == {"step": 2.0, "loss": 5.4, "lr": 0.001, "tokens_per_s": 120.0, "val_loss": 5.3}
    cluster.describe("Succeeded")
    assert found.status() is status, "asked at most every ten seconds"
    found.stop()
    assert found.status().state is State.stopped
    assert launcher.find(JOB, started.handle) is None


@pytest.mark.parametrize(
    ("pods", "state", "detail"),
    [
        ([], State.waiting, ""),
        ([pod("a", "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})],
         State.waiting, "ImagePullBackOff: no such image"),
        ([{"metadata": {"name": "a"}, "status": {"phase": "Pending", "conditions": [NO_NODE]}}],
         State.waiting, "Unschedulable: 0/4 nodes are free"),
        ([pod("a", "Running"), pod("b", "Running", restartCount=2)], State.running, "started again 2 times"),
    ],
)  # fmt: skip
def test_status_says_what_a_job_waits_for(pods: list[dict[str, Any]], state: State, detail: str) -> None:
    found = status_of({"status": {"conditions": [{"type": "Created", "status": "True"}]}}, pods)
    assert (found.state, found.detail) == (state, detail)


def test_ctrl_c_asks_and_a_stop_deletes_the_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.describe("Running", pods=[pod("a-master-0", "Running")])
    cluster.log(*STEPS)
    answers, stream = iter([False, True]), io.StringIO()

    class Impatient(Watch):
        def pause(self, wait_s: float) -> None:
            super().pause(wait_s)
            if self._status.state is State.running:
                raise KeyboardInterrupt

    job = submitted()
    assert follow_until_end(Impatient(job, PlainScreen(stream)), lambda question: next(answers)) == 130
    assert stream.getvalue().splitlines()[-1] == (
        "the job goes on; to stop it: kubectl --namespace=training delete pytorchjobs.kubeflow.org/job"
    )
    assert follow_until_end(Impatient(job, PlainScreen(stream)), lambda question: next(answers)) == 75
    assert "stopping: the processes have their time for a checkpoint" in stream.getvalue()
    deleted = [words[1:] for words in cluster.asked if "delete" in words]
    assert deleted == [["delete", "pytorchjobs.kubeflow.org/job", "--wait=false", "--ignore-not-found"]]
    job.stop()
    assert cluster.asked[-1][1:] == [
        "delete", "pods", "--selector=shardwright/job=job", "--grace-period=1", "--wait=false",
    ]  # fmt: skip


def test_log_is_shown_once_though_it_is_opened_again(cluster: Cluster) -> None:
    cluster.describe("Running", pods=[pod("a-master-0", "Running")])
    cluster.log(*STEPS[:2])
    stream = io.StringIO()
    watch = Watch(submitted(), PlainScreen(stream))
    assert not watch.look_patiently()
    watch.pause(1.0)
    cluster.log(*STEPS)
    cluster.describe("Succeeded", pods=[pod("a-master-0", "Succeeded", 0)])
    assert watch.look_patiently()
    watch.pause(1.0)
    watch.close()
    assert [line for line in stream.getvalue().splitlines() if line in STEPS] == list(STEPS)
    assert any(word.startswith("--since-time=2026-11-22T09:00:01") for word in cluster.asked[-1])


def test_cluster_that_is_away_for_a_while_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.fail("Unable to connect to the server: connection refused")
    watch = Watch(submitted(), PlainScreen(stream := io.StringIO()))
    assert not watch.look_patiently()
    assert "The job goes on; asking again" in stream.getvalue()
    monkeypatch.setattr("trainer.launch.following.PATIENCE_S", -1.0)
    with pytest.raises(ConfigError, match="connection refused"):
        watch.look_patiently()
    (cluster.folder / "fails").unlink()
    cluster.describe("Succeeded")
    assert follow(submitted(), stream) == 0


# The container of a manifest, started as a kubelet starts it with what an operator adds.


def shardwright(where: Path) -> Path:
    """The installed command, of this checkout."""
    where.mkdir()
    program = where / "shardwright"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from trainer.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    return where


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_two_pods_of_a_manifest_train_together(tmp_path: Path) -> None:
    words = [*TINY_JOB, "trainer.max_steps=3", "trainer.eval_every=3", f"run.dir={tmp_path}/run"]
    launcher = KubernetesLauncher(image=IMAGE, gpus=0, nodes=2)
    job = LaunchJob(name="x", script=SCRIPT, overrides=tuple(words))
    launcher.check([job])
    made = container(yaml.safe_load(yaml.safe_dump(launcher.manifest(job))))
    programs, port = shardwright(tmp_path / "bin"), free_port()
    kept = {"HOME": os.environ["HOME"], "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    started = []
    for node in (1, 0):
        # What the training operator adds since 1.7; RANK counts pods.
        operator = {
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(node),
            "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": str(port), "PET_NODE_RANK": str(node),
            "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1",
        }  # fmt: skip
        command, variables = command_of(made, operator)
        log = (tmp_path / f"pod-{node}").open("w")
        more = {"OMP_NUM_THREADS": "1", "SHARDWRIGHT_SHOW": "each_machine"}
        with log:
            started.append(
                subprocess.Popen(
                    command, env={**kept, **variables, **more}, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
                )
            )
    try:
        codes = [process.wait(90) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = [(tmp_path / f"pod-{node}").read_text() for node in (0, 1)]
    assert codes == [0, 0], logs
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    # HyperPod's agent reads the first process of each node, from the beginning of each line.
    rules = log_rules(KubernetesLauncher(kind=Kind.hyperpod, gpus=0, hyperpod=HyperPod(slow_tokens_per_s=10)))
    for log in logs:
        matched = [[line for line in log.splitlines() if re.match(rule["logPattern"], line)] for rule in rules]
        assert [line.split()[0] for line in matched[0][:4]] == ["step=1/3", "step=2/3", "step=3/3", "step=3"]
        assert all(line.startswith("step=3 val_") for line in matched[0][3:])
        assert matched[0] == matched[1]
        assert [line.split()[0] for line in matched[2]] == ["step=1/3", "step=2/3", "step=3/3"]
        speeds = [re.match(rules[2]["logPattern"], line) for line in matched[2]]
        assert all(speed is not None and float(speed[1]) > 0 for speed in speeds)
