"""The real kubectl, which reads our manifests and takes our words, before a server that only remembers."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.api_server import RESOURCES, Cluster, cluster
from tests.trainer.launch.cluster import pod
from tests.trainer.launch.test_kubernetes_manifest import IMAGE
from trainer.commands.launch import SCRIPT
from trainer.launch import KubernetesLauncher, LaunchJob, State
from trainer.launch.following import follow_until_end
from trainer.launch.kubernetes_follow import Watch
from trainer.launch.kubernetes_job import PodsJob, container_of
from trainer.launch.kubernetes_manifest import JOB
from trainer.launch.kubernetes_parts import Kind
from trainer.metrics.screen import PlainScreen

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="needs kubectl: set SHARDWRIGHT_CLUSTER=all"
    ),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl isn't installed"),
]

ODD = ("data.path=${oc.env:HOME}/a b", "run.note='it''s \"$(RANK)\" $$5'", "+x={y: 1}", "run.name=on", "a=007")
LOG = "2026-11-22T09:00:00.000000001Z step=1/2 loss=5.5\n2026-11-22T09:00:01.000000001Z step=2/2 loss=5.4\n"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("trainer.launch.following.EVERY_S", 0.5)
    with cluster(tmp_path) as found:
        yield found


def running(job: PodsJob, kind: Kind) -> dict[str, Any]:
    """A pod of it."""
    made = pod(f"{job.name}-0", "Running")
    made["metadata"] |= {"labels": {JOB: job.name}, "namespace": "training"}
    spec = {"containers": [{"name": container_of(kind), "image": IMAGE}]}
    return {"apiVersion": "v1", "kind": "Pod", **made, "spec": spec}


@pytest.mark.parametrize("kind", Kind)
def test_job_goes_to_the_server_as_it_was_made_and_comes_back(server: Cluster, kind: Kind) -> None:
    launcher = KubernetesLauncher(kind=kind, image=IMAGE, gpus=0, nodes=2, annotations={"note": "yes"})
    job = LaunchJob(name="first_run", script=SCRIPT, overrides=ODD)
    launcher.check([job])
    submitted = launcher.start(job)
    assert isinstance(submitted, PodsJob)
    [(path, sent)] = server.objects.items()
    group = next(each for each, (_, name) in RESOURCES.items() if name == kind.value)
    assert path == f"/apis/{group}/namespaces/training/{RESOURCES[group][0]}/{submitted.name}"
    made = launcher.manifest(job)
    ours, theirs = made["metadata"], sent["metadata"]
    assert theirs["labels"].keys() == ours["labels"].keys()
    assert theirs["annotations"].pop("kubectl.kubernetes.io/last-applied-configuration")
    assert theirs["annotations"] == {"note": "yes"}
    name, fresh = theirs["name"], ours["name"]
    assert json.loads(json.dumps(sent["spec"]).replace(name, fresh)) == made["spec"]

    server.objects[f"/api/v1/namespaces/training/pods/{name}-0"] = running(submitted, kind)
    server.log = LOG
    found = launcher.find(job, submitted.handle)
    assert found is not None
    status = found.status()
    assert (status.state, status.metrics["loss"]) == (State.running, 5.4)

    watch, stream = Watch(submitted, PlainScreen(io.StringIO())), io.StringIO()
    assert not watch.look()
    watch.pause(2.0)
    watch.close()
    assert watch._newest == "2026-11-22T09:00:01.000000001Z"
    sent["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "it burns"}]}
    assert follow_until_end(Watch(submitted, PlainScreen(stream))) == 1
    assert stream.getvalue().splitlines()[-1] == "failed: it burns"

    submitted.stop()
    assert path not in server.objects
    assert submitted.look().state is State.running, "its pod is still there"
    submitted.stop()
    assert server.objects == {}
    assert launcher.find(job, submitted.handle) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": Kind.jobset}, "The cluster lacks this operator: install it, or use another (launcher.kind)"),
        ({"context": "other"}, "Choose one of kubectl config get-contexts (launcher.context)"),
    ],
)
def test_what_kubectl_refuses_says_what_to_do(
    server: Cluster, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.delitem(RESOURCES, "jobset.x-k8s.io/v1alpha2")
    with pytest.raises(ConfigError) as error:
        KubernetesLauncher(image=IMAGE, gpus=0, **settings).start(LaunchJob(name="x", script=SCRIPT))
    assert said in str(error.value)
    assert server.objects == {}


def test_server_that_is_away_is_one_line(server: Cluster, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "config").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "config").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"refused.* Look at kubectl cluster-info \(launcher.context\)"):
        KubernetesLauncher(image=IMAGE, gpus=0).start(LaunchJob(name="x", script=SCRIPT))
