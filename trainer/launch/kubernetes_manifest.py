"""A job as a manifest of Kubernetes: pure functions, which hand nothing over."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from trainer.launch import kubernetes_parts as parts
from trainer.launch.containers import OURS_BY_NAME, given
from trainer.launch.kubernetes_parts import Kind
from trainer.stop import EXIT_WRONG_INPUT, seconds

if TYPE_CHECKING:
    from trainer.launch.kubernetes import KubernetesLauncher

RUN = "shardwright/run"
"""Label with the run's name."""
JOB = "shardwright/job"
"""Label with the job's name, on each of its pods."""
_KEEP = "1d"
PORT = 23456
"""At which the nodes' programs meet; the training operator's own choice."""
_AGENT_PORT = 8080
"""At which HyperPod's agent listens to its operator."""
STEP_LINE = r".*\bstep=[0-9]+(/[0-9]+)? [a-z_0-9]+=.*"
"""Each line of a step or an evaluation that the display prints; matched from the line's beginning."""
_SPEED_LINE = r".*\bstep=[0-9/]+ .*\btokens_per_s=([0-9]+).*"
_LONGEST_NAME = 46
"""Leaves room for what operators put behind it: names of hosts have 63 characters."""
_DUMPS = "logs/nccl_trace_rank_"
_LOGS = "/tmp/hyperpod"  # noqa: S108 - in the container
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(
    settings: KubernetesLauncher, *, run: str, words: Sequence[str], script: str | None, now: datetime
) -> dict[str, Any]:
    """The manifest of a job.

    Args:
        settings: checked ones.
        run: its name; jobs with the same one go on from each other's checkpoints.
        words: `key=value`, for the script.
        script: in the image; None: this package's own.
        now: makes the job's name unique.
    """
    name = job_name(run, now)
    made = _SPECS[settings.kind](settings, name, _container(settings, name, words, script))
    api = {
        Kind.pytorchjob: "kubeflow.org/v1",
        Kind.hyperpod: "sagemaker.amazonaws.com/v1",
        Kind.jobset: "jobset.x-k8s.io/v1alpha2",
        Kind.trainjob: "trainer.kubeflow.org/v1alpha1",
    }[settings.kind]
    metadata: dict[str, Any] = {"name": name}
    if settings.namespace is not None:
        metadata["namespace"] = settings.namespace
    metadata["labels"] = _labels(settings, name) | {RUN: run_label(run)}
    if settings.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = settings.queue
    if settings.annotations:
        metadata["annotations"] = dict(settings.annotations)
    return {"apiVersion": api, "kind": settings.kind.value, "metadata": metadata, "spec": made}


def as_yaml(made: dict[str, Any]) -> str:
    """For kubectl, and for people."""
    import yaml

    apart = json.loads(json.dumps(made))  # else what occurs twice is written as a reference
    return yaml.safe_dump(apart, sort_keys=False, width=1000, allow_unicode=True)


def job_name(run: str, now: datetime) -> str:
    """The run's, and the time; begins with a letter, as names of services must."""
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-") or "run"
    plain = plain if plain[0].isalpha() else f"run-{plain}"
    suffix = f"-{now:%y%m%d-%H%M%S}"
    return _shortened(plain, run, _LONGEST_NAME - len(suffix)) + suffix


def run_label(run: str) -> str:
    """A run's name as a label's value."""
    return _shortened(re.sub(r"[^A-Za-z0-9_.-]+", "-", run).strip("-_.") or "run", run, 63)


def _shortened(plain: str, run: str, most: int) -> str:
    """Two runs never get the same: those of a sweep differ at their ends."""
    if len(plain) <= most:
        return plain
    return f"{plain[: most - 7].rstrip('-_.')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


def _labels(settings: KubernetesLauncher, name: str) -> dict[str, str]:
    return {"app.kubernetes.io/managed-by": "shardwright", **settings.labels, JOB: name}


def _container(settings: KubernetesLauncher, name: str, words: Sequence[str], script: str | None) -> dict[str, Any]:
    """The one that trains, as far as it is the same for all kinds."""
    command, arguments = _command(settings, words, script)
    made: dict[str, Any] = {
        "name": {Kind.pytorchjob: "pytorch", Kind.hyperpod: "pytorch"}.get(settings.kind, "node"),
        "image": settings.image,
        "imagePullPolicy": settings.pull.value,
        "command": command,
        # Kubernetes replaces $(NAME) in these, and $$ by $; no shell reads them.
        "args": [word.replace("$", "$$") for word in arguments],
    }
    if settings.workdir is not None:
        made["workingDir"] = settings.workdir
    made["env"] = _environment(settings, name, words)
    if resources := _resources(settings):
        # Devices can't be asked for without the same limit, and the rest is one job's, whole or not at all.
        made["resources"] = {"requests": dict(resources), "limits": dict(resources)}
    mounts = [volume.mount() for volume in settings.mounted]
    made["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}, *mounts]  # noqa: S108 - in the container
    return made


def _command(settings: KubernetesLauncher, words: Sequence[str], script: str | None) -> tuple[list[str], list[str]]:
    if settings.kind is Kind.hyperpod:
        # Its agent must be the container's first process, and reads what rank 0 of the node prints from a file.
        options = [
            f"--nnodes={settings.nodes}",
            f"--nproc-per-node={settings.processes_now}",
            "--rdzv-backend=hyperpod",
            "--shutdown-signal=SIGTERM",
            f"--shutdown-timeout={settings.grace_s}",
            "--tee=3",
            f"--log-dir={_LOGS}",
        ]
        by_name = script is None or script in OURS_BY_NAME
        ours = ["--no-python", "shardwright", (script or "train.py").removesuffix(".py")]
        return ["hyperpodrun"], [*options, *(ours if by_name else [str(script)]), *words]
    options = [f"--processes={settings.processes_now}", *([] if script is None else [f"--script={script}"])]
    return ["shardwright", "node"], [*options, *words]


def _environment(settings: KubernetesLauncher, name: str, words: Sequence[str]) -> list[dict[str, Any]]:
    gpus, efa = settings.per_node
    found = {"PYTHONUNBUFFERED": "1", "SHARDWRIGHT_GRACE_S": str(settings.grace_s)}
    if settings.kind is Kind.hyperpod:
        found["SHARDWRIGHT_SHOW"] = "each_machine"  # each node's agent looks for lines of steps
    if gpus:
        folder = given(words, "run.dir")
        place = "/tmp/nccl_trace_rank_" if folder is None else f"{folder}/{_DUMPS}"  # noqa: S108 - in the container
        # What each rank was doing when a collective timed out.
        found |= {
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "20000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": place,
        }
    if efa:  # without pages of its own in the pod, a fork for data workers may fail for memory
        found["FI_EFA_USE_HUGE_PAGE"] = "0" if settings.hugepages is None else "1"
    made: list[dict[str, Any]] = [
        {"name": variable, "value": value} for variable, value in (found | settings.environment).items()
    ]
    made += [parts.secret(variable, place) for variable, place in settings.secrets.items()]
    if settings.kind is Kind.jobset:  # the others' operators say it themselves
        made += [
            {"name": "PET_NNODES", "value": str(settings.nodes)},
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
            {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
            {"name": "PET_MASTER_PORT", "value": str(PORT)},
        ]
    return made


def _resources(settings: KubernetesLauncher) -> dict[str, Any]:
    gpus, efa = settings.per_node
    found: dict[str, Any] = {"cpu": settings.cpu, "memory": settings.memory, "hugepages-2Mi": settings.hugepages}
    found |= {"nvidia.com/gpu": str(gpus) if gpus else None, "vpc.amazonaws.com/efa": str(efa) if efa else None}
    return {name: amount for name, amount in found.items() if amount is not None}


def _volumes(settings: KubernetesLauncher) -> list[dict[str, Any]]:
    memory: dict[str, Any] = {"medium": "Memory"}
    if settings.shared_memory is not None:
        memory["sizeLimit"] = settings.shared_memory
    return [{"name": "shm", "emptyDir": memory}, *(volume.source() for volume in settings.mounted)]


def _selector(settings: KubernetesLauncher) -> dict[str, str]:
    found = dict(settings.node_selector)
    if (name := settings.instance_type) is not None:
        whole = f"ml.{name.removeprefix('ml.')}" if settings.kind is Kind.hyperpod else name
        found["node.kubernetes.io/instance-type"] = whole
    if settings.hyperpod.healthy_only:
        found["sagemaker.amazonaws.com/deep-health-check-status"] = "Passed"
    return found


def _pod(settings: KubernetesLauncher, name: str) -> dict[str, Any]:
    """A pod's template without its container, and without what not all kinds take."""
    spec: dict[str, Any] = {"terminationGracePeriodSeconds": settings.grace_s + 30, "volumes": _volumes(settings)}
    if selector := _selector(settings):
        spec["nodeSelector"] = selector
    if settings.tolerations:
        spec["tolerations"] = [parts.toleration(text) for text in settings.tolerations]
    if settings.service_account is not None:
        spec["serviceAccountName"] = settings.service_account
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": each} for each in settings.pull_secrets]
    metadata: dict[str, Any] = {"labels": _labels(settings, name)}
    if settings.annotations:
        metadata["annotations"] = dict(settings.annotations)
    return {"metadata": metadata, "spec": spec}


def _whole_pod(settings: KubernetesLauncher, name: str, container: dict[str, Any], **more: Any) -> dict[str, Any]:
    pod = _pod(settings, name)
    if settings.priority_class is not None:
        pod["spec"]["priorityClassName"] = settings.priority_class
    return pod | {"spec": {**more, "containers": [container], **pod["spec"]}}


def _port(number: int, **more: str) -> dict[str, Any]:
    return {"ports": [{**more, "containerPort": number, "protocol": "TCP"}]}


def _whole_seconds(text: str) -> int:
    found = seconds(text, "launcher")
    assert found is not None
    return max(1, round(found))


def _pytorchjob(settings: KubernetesLauncher, name: str, container: dict[str, Any]) -> dict[str, Any]:
    pod = _whole_pod(settings, name, container | _port(PORT, name="pytorchjob-port"))
    policy = "OnFailure" if settings.restarts_now else "Never"
    replicas = {"Master": {"replicas": 1, "restartPolicy": policy, "template": pod}}
    if settings.nodes > 1:
        replicas["Worker"] = {"replicas": settings.nodes - 1, "restartPolicy": policy, "template": pod}
    # The operator adds up the restarts of all pods, and ends the job when the sum reaches the limit.
    limit = settings.restarts_now * settings.nodes + 1 if settings.restarts_now else 0
    run: dict[str, Any] = {"backoffLimit": limit, "cleanPodPolicy": "None"}
    run["ttlSecondsAfterFinished"] = _whole_seconds(settings.keep or _KEEP)
    if settings.max_run is not None:
        run["activeDeadlineSeconds"] = _whole_seconds(settings.max_run)
    return {
        "nprocPerNode": str(settings.processes_now),
        "runPolicy": run,
        "pytorchReplicaSpecs": replicas,
    }


def _hyperpod(settings: KubernetesLauncher, name: str, container: dict[str, Any]) -> dict[str, Any]:
    ours = settings.hyperpod
    pod = _whole_pod(settings, name, container | _port(_AGENT_PORT))
    run: dict[str, Any] = {
        "jobMaxRetryCount": settings.restarts_now,
        "restartPolicy": {
            "numRestartBeforeFullJobRestart": ours.node_restarts,
            "evalPeriodSeconds": _whole_seconds(ours.restart_period),
            "maxFullJobRestarts": ours.full_restarts,
        },
        "cleanPodPolicy": "None",
        "ttlSecondsAfterFinished": _whole_seconds(settings.keep or _KEEP),
        "logMonitoringConfiguration": log_rules(settings),
    }
    if settings.max_run is not None:
        run["activeDeadlineSeconds"] = _whole_seconds(settings.max_run)
    replica = {"name": "node", "replicas": settings.nodes, "template": pod}
    found: dict[str, Any] = {"nprocPerNode": str(settings.processes_now), "replicaSpecs": [replica], "runPolicy": run}
    if ours.elastic:
        sizes = ours.sizes(settings.nodes)
        replica["maxReplicas"] = sizes[-1]
        steps = {"replicaDiscreteValues": list(sizes)} if ours.node_counts else {"replicaIncrementStep": ours.step}
        ends = {"minReplicas": sizes[0], "maxReplicas": sizes[-1]}
        found["elasticPolicy"] = {**ends, **steps, "gracefulShutdownTimeoutInSeconds": settings.grace_s}
    return found


def log_rules(settings: KubernetesLauncher) -> list[dict[str, Any]]:
    """By which HyperPod's agent sees from the log that a job doesn't start, hangs or is slow."""
    ours = settings.hyperpod
    starts_s, hangs_s = _whole_seconds(ours.start_time), _whole_seconds(ours.hang_time)
    rules: list[dict[str, Any]] = [
        {"name": "Starts", "logPattern": STEP_LINE, "expectedStartCutOffInSeconds": starts_s},
        {"name": "Steps", "logPattern": STEP_LINE, "expectedRecurringFrequencyInSeconds": hangs_s},
    ]
    if ours.slow_tokens_per_s is not None:
        rules.append(
            {
                "name": "FastEnough",
                "logPattern": _SPEED_LINE,
                "metricThreshold": ours.slow_tokens_per_s,
                "operator": "lt",
                "metricEvaluationDataPoints": ours.slow_lines,
            }
        )
    return rules


def _jobset(settings: KubernetesLauncher, name: str, container: dict[str, Any]) -> dict[str, Any]:
    pod = _whole_pod(settings, name, container | _port(PORT), restartPolicy="Never")
    wrong = {"containerName": "node", "operator": "In", "values": [EXIT_WRONG_INPUT]}
    job: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": settings.nodes,
        "parallelism": settings.nodes,
        "backoffLimit": 0,  # one that fails ends all, since they train together; then all are made again
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong}]},
        "template": pod,
    }
    if settings.max_run is not None:
        job["activeDeadlineSeconds"] = _whole_seconds(settings.max_run)
    useless = {"name": "wrong_input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": settings.restarts_now, "rules": [useless]},
        "ttlSecondsAfterFinished": _whole_seconds(settings.keep or _KEEP),
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }


def _trainjob(settings: KubernetesLauncher, name: str, container: dict[str, Any]) -> dict[str, Any]:
    pod = _pod(settings, name)
    pod["spec"]["containers"] = [{"name": "node", "volumeMounts": container["volumeMounts"]}]
    trainer: dict[str, Any] = {
        "numNodes": settings.nodes,
        "numProcPerNode": settings.processes_now,
        **{key: container[key] for key in ("image", "command", "args", "env")},
    }
    if "resources" in container:
        trainer["resourcesPerNode"] = container["resources"]
    job = {"name": "node", "template": {"spec": {"template": pod}}}
    found: dict[str, Any] = {
        "runtimeRef": {"name": settings.runtime or "torch-distributed"},
        "trainer": trainer,
        "runtimePatches": [
            {"manager": "shardwright/launch", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
        ],
    }
    if settings.max_run is not None:
        found["activeDeadlineSeconds"] = _whole_seconds(settings.max_run)
    return found


_SPECS: dict[Kind, Callable[[KubernetesLauncher, str, dict[str, Any]], dict[str, Any]]] = {
    Kind.pytorchjob: _pytorchjob,
    Kind.hyperpod: _hyperpod,
    Kind.jobset: _jobset,
    Kind.trainjob: _trainjob,
}
