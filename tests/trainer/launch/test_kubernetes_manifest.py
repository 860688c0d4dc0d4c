"""Manifests of Kubernetes field by field, and settings that make none."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from strategies.errors import ConfigError
from tests.trainer.launch.cluster import command_of, expanded
from trainer.commands import COMMANDS
from trainer.commands.launch import SCRIPT
from trainer.launch import KubernetesLauncher, LaunchJob
from trainer.launch.instances import INSTANCES
from trainer.launch.kubernetes_manifest import as_yaml, job_name, run_label
from trainer.launch.kubernetes_parts import HyperPod, Kind, Pull

IMAGE = "registry.example.com:5000/team/shardwright:1.0"
ODD = (
    "data.path=${oc.env:HOME}/a b",
    "run.note='it''s \"$(RANK)\" $$5'",
    "optimizer.lr=1e-3",
    "hooks=[a,b]",
    "+x={y:1}",
)
VOLUMES = {"shared": "fsx:/fsx"}


def checked(*words: str, run: str = "first_run", **settings: Any) -> tuple[KubernetesLauncher, LaunchJob]:
    """A launcher that would take a job with these words."""
    launcher = KubernetesLauncher(**{"image": IMAGE, "gpus": 0, **settings})
    job = LaunchJob(name=run, script=SCRIPT, overrides=words)
    launcher.check([job])
    return launcher, job


def made(*words: str, **settings: Any) -> dict[str, Any]:
    launcher, job = checked(*words, **settings)
    return launcher.manifest(job)


def template(manifest: dict[str, Any]) -> dict[str, Any]:
    """Of the pods."""
    spec = manifest["spec"]
    if "pytorchReplicaSpecs" in spec:
        return spec["pytorchReplicaSpecs"]["Master"]["template"]
    if "replicaSpecs" in spec:
        return spec["replicaSpecs"][0]["template"]
    if "replicatedJobs" in spec:
        return spec["replicatedJobs"][0]["template"]["spec"]["template"]
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    return patch["template"]["spec"]["template"]


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    """The one that trains."""
    found = template(manifest)["spec"]["containers"][0]
    return found | manifest["spec"].get("trainer", {})


def test_pytorchjob_has_every_field_that_was_asked_for() -> None:
    manifest = made(
        "trainer.max_steps=3",
        nodes=3, instance_type="p4d.24xlarge", gpus=None, namespace="training", cpu="90", memory="900Gi",
        shared_memory="200Gi", volumes={**VOLUMES, "raw": {"host": "/mnt/x", "path": "/raw", "read_only": True}},
        run_root="/fsx/runs", environment={"LEVEL": "3"}, secrets={"HF_TOKEN": "hub/token"}, labels={"team": "nlp"},
        annotations={"note": "what it is for"}, node_selector={"zone": "a"}, tolerations=["nvidia.com/gpu:NoSchedule"],
        service_account="trainer", priority_class="high", queue="shared", pull=Pull.always, pull_secrets=["registry"],
        restarts=5, grace="2m", max_run="12h", keep="2h", workdir="/workspace",
    )  # fmt: skip
    name = manifest["metadata"]["name"]
    assert re.fullmatch(r"first-run-\d{6}-\d{6}", name)
    labels = {"app.kubernetes.io/managed-by": "shardwright", "team": "nlp", "shardwright/job": name}
    devices = {"cpu": "90", "memory": "900Gi", "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "4"}
    environment = {
        "PYTHONUNBUFFERED": "1", "SHARDWRIGHT_GRACE_S": "120", "TORCH_NCCL_TRACE_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/fsx/runs/first_run/logs/nccl_trace_rank_",
        "FI_EFA_USE_HUGE_PAGE": "0", "LEVEL": "3",
    }  # fmt: skip
    pod = {
        "metadata": {"labels": labels, "annotations": {"note": "what it is for"}},
        "spec": {
            "containers": [
                {
                    "name": "pytorch",
                    "image": IMAGE,
                    "imagePullPolicy": "Always",
                    "command": ["shardwright", "node"],
                    "args": ["--processes=8", "trainer.max_steps=3", "run.dir=/fsx/runs/first_run"],
                    "workingDir": "/workspace",
                    "env": [
                        *({"name": key, "value": value} for key, value in environment.items()),
                        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
                    ],
                    "resources": {"requests": devices, "limits": devices},
                    "volumeMounts": [
                        {"name": "shm", "mountPath": "/dev/shm"},
                        {"name": "shared", "mountPath": "/fsx"},
                        {"name": "raw", "mountPath": "/raw", "readOnly": True},
                    ],
                    "ports": [{"name": "pytorchjob-port", "containerPort": 23456, "protocol": "TCP"}],
                }
            ],
            "terminationGracePeriodSeconds": 150,
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "200Gi"}},
                {"name": "shared", "persistentVolumeClaim": {"claimName": "fsx"}},
                {"name": "raw", "hostPath": {"path": "/mnt/x", "type": "Directory"}},
            ],
            "nodeSelector": {"zone": "a", "node.kubernetes.io/instance-type": "p4d.24xlarge"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "serviceAccountName": "trainer",
            "imagePullSecrets": [{"name": "registry"}],
            "priorityClassName": "high",
        },
    }
    assert manifest == {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {
            "name": name,
            "namespace": "training",
            "labels": {**labels, "shardwright/run": "first_run", "kueue.x-k8s.io/queue-name": "shared"},
            "annotations": {"note": "what it is for"},
        },
        "spec": {
            "nprocPerNode": "8",
            # All pods' restarts are added up, and the job ends when the limit is reached.
            "runPolicy": {"backoffLimit": 16, "cleanPodPolicy": "None", "ttlSecondsAfterFinished": 7200,
                          "activeDeadlineSeconds": 43200},
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod},
                "Worker": {"replicas": 2, "restartPolicy": "OnFailure", "template": pod},
            },
        },
    }  # fmt: skip


def test_pytorchjob_of_one_node_without_restarts_asks_for_no_more_than_that() -> None:
    spec = made(restarts=0)["spec"]
    assert spec["pytorchReplicaSpecs"].keys() == {"Master"}
    assert spec["pytorchReplicaSpecs"]["Master"]["restartPolicy"] == "Never"
    assert spec["runPolicy"]["backoffLimit"] == 0
    assert spec["nprocPerNode"] == "1"
    whole = container(made())
    assert "resources" not in whole
    assert [each["name"] for each in whole["env"]] == ["PYTHONUNBUFFERED", "SHARDWRIGHT_GRACE_S"]


def test_hyperpod_job_has_its_agent_its_policies_and_its_rules() -> None:
    manifest = made(
        "trainer.global_batch=64", kind=Kind.hyperpod, nodes=2, instance_type="p5.48xlarge", gpus=None,
        volumes=VOLUMES, run_root="/fsx/runs", restarts=10, grace="10m",
        hyperpod=HyperPod(node_counts=[1, 2, 4], start_time="4m", hang_time="10m", slow_tokens_per_s=1000, slow_lines=5,
                          node_restarts=2, full_restarts=4, restart_period="1h", healthy_only=True),
    )  # fmt: skip
    spec, pod = manifest["spec"], template(manifest)["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("sagemaker.amazonaws.com/v1", "HyperPodPyTorchJob")
    assert spec["nprocPerNode"] == "8"
    [replica] = spec["replicaSpecs"]
    assert (replica["name"], replica["replicas"], replica["maxReplicas"]) == ("node", 2, 4)
    assert spec["elasticPolicy"] == {
        "minReplicas": 1, "maxReplicas": 4, "replicaDiscreteValues": [1, 2, 4], "gracefulShutdownTimeoutInSeconds": 600,
    }  # fmt: skip
    pattern = r".*\bstep=[0-9]+(/[0-9]+)? [a-z_0-9]+=.*"
    assert spec["runPolicy"] == {
        "jobMaxRetryCount": 10,
        "restartPolicy": {"numRestartBeforeFullJobRestart": 2, "evalPeriodSeconds": 3600, "maxFullJobRestarts": 4},
        "cleanPodPolicy": "None",
        "ttlSecondsAfterFinished": 86400,
        "logMonitoringConfiguration": [
            {"name": "Starts", "logPattern": pattern, "expectedStartCutOffInSeconds": 240},
            {"name": "Steps", "logPattern": pattern, "expectedRecurringFrequencyInSeconds": 600},
            {
                "name": "FastEnough", "logPattern": r".*\bstep=[0-9/]+ .*\btokens_per_s=([0-9]+).*",
                "metricThreshold": 1000, "operator": "lt", "metricEvaluationDataPoints": 5,
            },
        ],
    }  # fmt: skip
    assert container(manifest)["command"] == ["hyperpodrun"]
    assert container(manifest)["args"] == [
        *("--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=hyperpod", "--shutdown-signal=SIGTERM"),
        *("--shutdown-timeout=600", "--tee=3", "--log-dir=/tmp/hyperpod", "--no-python", "shardwright", "train"),
        *("trainer.global_batch=64", "run.dir=/fsx/runs/first_run"),
    ]
    variables = {each["name"]: each["value"] for each in container(manifest)["env"]}
    assert variables["SHARDWRIGHT_SHOW"] == "each_machine"
    assert variables["SHARDWRIGHT_GRACE_S"] == "600"
    assert pod["nodeSelector"] == {
        "node.kubernetes.io/instance-type": "ml.p5.48xlarge",
        "sagemaker.amazonaws.com/deep-health-check-status": "Passed",
    }
    assert pod["terminationGracePeriodSeconds"] == 630


def test_jobset_begins_all_pods_again_and_gives_up_on_wrong_input() -> None:
    manifest = made(kind=Kind.jobset, nodes=2, restarts=4)
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "subdomain": name}
    assert spec["failurePolicy"] == {
        "maxRestarts": 4,
        "rules": [{"name": "wrong_input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 2, 2, 0)
    codes = {"containerName": "node", "operator": "In", "values": [2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    variables = {each["name"]: each.get("value") for each in container(manifest)["env"]}
    assert variables["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    assert (variables["PET_NNODES"], variables["PET_MASTER_PORT"]) == ("2", "23456")


def test_trainjob_leaves_to_its_runtime_what_that_has() -> None:
    manifest = made(kind=Kind.trainjob, nodes=2, processes=3, volumes=VOLUMES, memory="8Gi", tolerations=["a=b"])
    spec = manifest["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed"}
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (2, 3)
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"memory": "8Gi"}
    [node] = template(manifest)["spec"]["containers"]
    assert node.keys() == {"name", "volumeMounts"}
    assert template(manifest)["spec"]["tolerations"] == [{"key": "a", "operator": "Equal", "value": "b"}]


@pytest.mark.parametrize("kind", Kind)
def test_words_reach_the_script_as_they_were_written(kind: Kind) -> None:
    launcher, job = checked(*ODD, kind=kind)
    read = yaml.safe_load(as_yaml(launcher.manifest(job)))
    words, _ = command_of(container(read), {"RANK": "1"})
    assert words[-len(ODD) :] == list(ODD)
    assert "&" not in as_yaml(made(nodes=2)), "what occurs twice is written twice"


def test_expansion_is_that_of_kubernetes() -> None:
    """The cases that its documents give."""
    variables = {"VAR": "value"}
    cases = {"$(VAR)": "value", "$$(VAR)": "$(VAR)", "$(OTHER)": "$(OTHER)", "$$$(VAR)": "$value", "$VAR": "$VAR"}
    assert {word: expanded(word, variables) for word in cases} == cases


def test_own_script_is_started_where_it_lies_in_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("")
    job = LaunchJob(name="x", script=Path("mine.py"))
    for settings, where in (({"workdir": "/w"}, "/w/mine.py"), ({"script": "/other/it.py"}, "/other/it.py")):
        launcher = KubernetesLauncher(image=IMAGE, gpus=0, **settings)
        launcher.check([job])
        assert f"--script={where}" in container(launcher.manifest(job))["args"]
    with pytest.raises(ConfigError, match=r"where in the image does mine.py lie\? .*launcher.script"):
        KubernetesLauncher(image=IMAGE, gpus=0).check([job])


def test_doctor_of_this_package_is_started_by_its_name() -> None:
    job = LaunchJob(name="x", script=SCRIPT.parent / "doctor.py")
    found = {}
    for kind in (Kind.pytorchjob, Kind.hyperpod):
        launcher = KubernetesLauncher(image=IMAGE, gpus=0, kind=kind)
        launcher.check([job])
        found[kind] = container(launcher.manifest(job))["args"]
        assert launcher.remarks(job) == []
    assert found[Kind.pytorchjob] == ["--processes=1", "--script=doctor.py"]
    assert found[Kind.hyperpod][-3:] == ["--no-python", "shardwright", "doctor"]


@pytest.mark.parametrize("run", ["a", "llama_tiny-python_stdlib-02b7bc", "x" * 200, "..Odd..Name--", "ü", "7b"])
def test_job_name_is_one_that_services_take(run: str) -> None:
    name = job_name(run, datetime(2026, 11, 22, 5, 4, 3, tzinfo=UTC))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{name}-worker-4999")
    assert len(f"{name}-worker-4999") <= 63
    assert name.endswith("-261122-050403")
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", run_label(run))


def test_long_names_of_a_sweep_stay_apart() -> None:
    now = datetime(2026, 11, 22, 5, 4, 3, tzinfo=UTC)
    runs = [f"sweep-hidden_size-num_hidden_layers-learning_rate-0a1b2c-{number:04d}-x=1" for number in range(20)]
    assert len({job_name(run, now) for run in runs}) == len({run_label(run) for run in runs}) == len(runs)
    assert all(len(run_label(run)) <= 63 for run in runs)


def test_devices_are_those_of_the_type_unless_said() -> None:
    def resources(**settings: Any) -> dict[str, str]:
        found: dict[str, str] = container(made(gpus=None, **settings))["resources"]["limits"]
        return found

    assert resources(instance_type="p5.48xlarge", nodes=2) == {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}
    assert resources(instance_type="p5.48xlarge") == {"nvidia.com/gpu": "8"}, "one node talks to nobody"
    assert resources(instance_type="ml.g5.xlarge", nodes=2) == {"nvidia.com/gpu": "1"}
    assert resources(instance_type="p4d.24xlarge", nodes=2, efa=0) == {"nvidia.com/gpu": "8"}
    huge = made(gpus=None, instance_type="p4d.24xlarge", nodes=2, hugepages="5120Mi")
    assert container(huge)["resources"]["limits"]["hugepages-2Mi"] == "5120Mi"
    assert {"name": "FI_EFA_USE_HUGE_PAGE", "value": "1"} in container(huge)["env"]
    assert all(each.gpus in (1, 4, 8) and each.efa <= 32 for each in INSTANCES.values())


HYPERPOD: dict[str, Any] = {"kind": Kind.hyperpod, "volumes": VOLUMES, "run_root": "/fsx/r"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image": None}, "which image?"),
        ({"image": "Not An Image"}, "is no image"),
        ({"namespace": "Training"}, "'Training' is no name"),
        ({"namespace": "x" * 64}, "at most 63"),
        ({"nodes": 0}, "nodes=0 is not in 1 to 5000"),
        ({"restarts": -1}, "restarts=-1"),
        ({"gpus": None}, "no instance type is given"),
        ({"gpus": None, "instance_type": "x9.large"}, "what x9.large has isn't known"),
        ({"gpus": 9, "instance_type": "p4d.24xlarge"}, "gpus=9, and p4d.24xlarge has 8"),
        ({"gpus": None, "instance_type": "g5.xlarge", "efa": 1}, "efa=1, and g5.xlarge has no EFA"),
        ({"gpus": None, "instance_type": "p4d.24xlarge", "efa": 32}, "efa=32, and p4d.24xlarge has 4"),
        ({"gpus": 2, "processes": 4}, "processes=4, and a node has 2 GPUs"),
        ({"instance_type": "p4 d"}, "can't have the value 'p4 d'"),
        ({"hugepages": "5120Mi"}, "are for EFA"),
        ({"cpu": "many"}, "'many' is no quantity"),
        ({"memory": "64gb"}, "'64gb' is no quantity"),
        ({"memory": "0"}, "'0' is no quantity"),
        ({"shared_memory": "-1Gi"}, "'-1Gi' is no quantity"),
        ({"labels": {"a b": "c"}}, "'a b' is no key"),
        ({"labels": {"a": "b c"}}, "can't have the value 'b c'"),
        ({"labels": {"Bad_Prefix/x": "y"}}, "is no key"),
        ({"annotations": {"/x": "y"}}, "is no key"),
        ({"node_selector": {"zone": "-a"}}, "can't have the value"),
        ({"tolerations": ["a=b:Never"]}, "is no toleration"),
        ({"environment": {"1X": "y"}}, "no variable's name"),
        ({"environment": {"RANK": "0"}}, "RANK is set in the job by itself"),
        ({"environment": {"PET_NNODES": "0"}}, "PET_NNODES is set in the job by itself"),
        ({"environment": {"HF_TOKEN": "hf_12345678"}}, "launcher.secrets.HF_TOKEN"),
        ({"environment": {"X": "1"}, "secrets": {"X": "a/b"}}, "X is a variable and a secret"),
        ({"secrets": {"HF_TOKEN": "hf_12345678"}}, "which entry of which secret?"),
        ({"secrets": {"HF_TOKEN": "A_B/c"}}, "'A_B' is no name"),
        ({"volumes": {"data": "fsx"}}, "'' is no folder"),
        ({"volumes": {"Data": "fsx:/x"}}, "'Data' is no name"),
        ({"volumes": {"shm": "fsx:/x"}}, "the volume shm is made by itself"),
        ({"volumes": {"data": {"claims": "x", "path": "/x"}}}, "a volume has no 'claims'"),
        ({"volumes": {"data": {"claim": "x", "host": "/y", "path": "/x"}}}, "a claim, or a folder"),
        ({"volumes": {"data": {"claim": "x", "path": "/x", "read_only": "no"}}}, "'no' is no bool"),
        ({"volumes": {"a": "x:/x", "b": "y:/x"}}, "two volumes at /x"),
        ({"volumes": {"data": 3}}, "3 is no volume"),
        ({"run_root": "/fsx/runs"}, "lies on no volume"),
        ({"run_root": "runs", "volumes": VOLUMES}, "no folder from / on"),
        ({"service_account": "My_Account"}, "is no name"),
        ({"grace": "soon"}, "launcher.grace='soon' is not a duration"),
        ({"max_run": "0"}, "launcher.max_run"),
        ({"runtime": "mine"}, "runtime=mine is a TrainJob's"),
        ({"kind": Kind.trainjob, "restarts": 3}, "a TrainJob takes restarts from its runtime"),
        ({"kind": Kind.trainjob, "pull": Pull.always}, "a TrainJob takes pull from its runtime"),
        ({"kind": Kind.trainjob, "keep": "2h"}, "a TrainJob takes keep from its runtime"),
        ({"hyperpod": HyperPod(min_nodes=1)}, "launcher.hyperpod is for kind=hyperpod, and kind=pytorchjob"),
        ({**HYPERPOD, "hyperpod": HyperPod(min_nodes=1, max_nodes=4, step=2)}, "can't have nodes=1 and at most 4"),
        ({**HYPERPOD, "hyperpod": HyperPod(min_nodes=2)}, "can't have nodes=1"),
        ({**HYPERPOD, "hyperpod": HyperPod(step=0)}, "step=0 is below 1"),
        ({**HYPERPOD, "hyperpod": HyperPod(node_counts=[4, 2])}, "don't rise"),
        ({**HYPERPOD, "hyperpod": HyperPod(node_counts=[1, 2], step=2)}, "says it all"),
        ({**HYPERPOD, "hyperpod": HyperPod(hang_time="x")}, "launcher.hyperpod.hang_time"),
        ({"kind": Kind.hyperpod, "hyperpod": HyperPod(max_nodes=2)}, "begins again whenever nodes come or go"),
        (
            {"node_selector": {"node.kubernetes.io/instance-type": "a"}, "instance_type": "g5.xlarge"},
            "both name the machines' type",
        ),
    ],
)  # fmt: skip
def test_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(**settings)
    assert said in str(error.value)
    assert str(error.value).startswith(("launch: ", "Trainer: launcher.")), str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(").")


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (["--cfg"], {}, "--cfg can't go along with a job"),
        (["run.dir=/x"], {"volumes": VOLUMES, "run_root": "/fsx"}, "run_root=/fsx and run.dir=/x both say"),
        (
            ["trainer.global_batch=8"],
            {**HYPERPOD, "hyperpod": HyperPod(max_nodes=3)},
            "trainer.global_batch=8 isn't a multiple of 3 ranks, which the job has on 3 nodes",
        ),
    ],
)
def test_wrong_word_is_refused_in_one_line(words: list[str], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(*words, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.kind=pytorchjobs"], "expected one of [pytorchjob, hyperpod, jobset, trainjob]"),
        (["launcher.node=2"], "Nearest: nodes"),
        (["launcher.nodes=two"], "launcher.nodes"),
        (["trainer.max_step=3"], "Nearest: max_steps"),
        (["launcher.volumes.data=fsx"], "is no folder from / on"),
    ],
)
def test_wrong_words_of_the_command_print_no_manifest(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    from trainer.cli import exit_code

    needed = ("launcher=kubernetes", f"launcher.image={IMAGE}", "launcher.gpus=0", "--dry-run")
    options = COMMANDS["launch"].parse([*needed, *words])
    assert exit_code(lambda: COMMANDS["launch"].run(options)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_dry_run_prints_the_manifest_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli import exit_code

    words = ["launcher=kubernetes", f"launcher.image={IMAGE}", "launcher.gpus=0", "launcher.nodes=2", "--dry-run",
             "checkpoint.folder=ftp://me:pass12345@files/run", "launcher.secrets.HF_TOKEN=hub/token"]  # fmt: skip
    options = COMMANDS["launch"].parse(words)
    assert exit_code(lambda: COMMANDS["launch"].run(options)) == 0
    out, err = capsys.readouterr()
    read = yaml.safe_load(out)
    assert read["kind"] == "PyTorchJob"
    assert container(read)["args"] == ["--processes=1", "checkpoint.folder=ftp://***@files/run"]
    assert "pass12345" not in out + err
    assert "checkpoint.folder: whoever may describe the job can read it" in err
    assert "no EFA is asked for: the 2 nodes talk over TCP" in err


def test_remarks_are_silent_where_all_is_well() -> None:
    launcher, job = checked(
        instance_type="p4d.24xlarge", gpus=None, nodes=2, volumes=VOLUMES, run_root="/fsx/runs"
    )  # fmt: skip
    assert launcher.remarks(job) == []
    launcher, job = checked(**{**HYPERPOD, "processes": 2, "hyperpod": HyperPod(node_counts=[1, 4])})
    assert "elastic: trainer.global_batch must be a multiple of each of [2, 8] ranks" in launcher.remarks(job)
    launcher, job = checked("checkpoint.folder=s3://mine/run")
    assert launcher.remarks(job) == []
    launcher, job = checked("run.dir=/elsewhere", volumes=VOLUMES)
    [line] = launcher.remarks(job)
    assert line.startswith("the run's folder lies in the containers and ends with them")
