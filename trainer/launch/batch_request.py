"""A job as AWS Batch's API takes it: pure functions, which send nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.stop import EXIT_WRONG_INPUT, seconds

if TYPE_CHECKING:
    from trainer.launch.batch import BatchLauncher

_LONGEST_NAME = 128
_GRACE_S = 30
"""Between SIGTERM and the kill: ECS's own, unless its agent is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A place of the container that outlives it."""

    name: str
    path: str
    host: str | None = None
    """Folder of the machine, such as FSx for Lustre mounted by the launch template."""
    efs: str | None = None
    """`fs-...` of EFS."""
    root: str | None = None
    """Folder of that file system."""
    read_only: bool = False

    def source(self) -> dict[str, Any]:
        """For the definition."""
        if self.host is not None:
            return {"name": self.name, "host": {"sourcePath": self.host}}
        efs = {"fileSystemId": self.efs, "transitEncryption": "ENABLED"}
        if self.root is not None:
            efs["rootDirectory"] = self.root
        return {"name": self.name, "efsVolumeConfiguration": efs}

    def mount(self) -> dict[str, Any]:
        """For the container."""
        return {"sourceVolume": self.name, "containerPath": self.path, "readOnly": self.read_only}


def volume(name: str, given: Any) -> Volume:
    """A volume from its settings.

    Raises:
        ConfigError: they make none.
    """
    key = f"launcher.volumes.{name}"
    kinds = {"host": str, "efs": str, "root": str, "path": str, "read_only": bool}
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", name):
        raise ConfigError(f"launch: {name!r} is no volume's name. Use letters, digits, - and _ ({key}).")
    if not isinstance(given, dict):
        raise ConfigError(f"launch: {given!r} is no volume. Write {{host:/fsx,path:/fsx}} ({key}).")
    for word, value in given.items():
        if word not in kinds:
            raise ConfigError(f"launch: a volume has no {word!r}. Choices: {', '.join(kinds)} ({key}).")
        if not isinstance(value, kinds[word]):
            raise ConfigError(f"launch: {value!r} is no {kinds[word].__name__} ({key}.{word}).")
        if word in ("host", "path", "root") and not str(value).startswith("/"):
            raise ConfigError(f"launch: {value!r} isn't written from / on ({key}.{word}).")
    if ("host" in given) == ("efs" in given):
        raise ConfigError(f"launch: is {name} a folder of the host, or EFS? Give host or efs, one of both ({key}).")
    if "efs" in given and not re.fullmatch(r"fs-[0-9a-f]{8,40}", given["efs"]):
        raise ConfigError(f"launch: {given['efs']!r} is no file system. Write fs-0123456789abcdef0 ({key}.efs).")
    if "root" in given and "efs" not in given:
        raise ConfigError(f"launch: root is a folder of EFS, and {name} is the host's. Leave it out ({key}.root).")
    if "path" not in given:
        raise ConfigError(f"launch: where in the container does {name} lie? Give its path ({key}.path).")
    return Volume(name=name, **given)


def job_definition(settings: BatchLauncher) -> dict[str, Any]:
    """The request RegisterJobDefinition: everything but the job's words, so that many jobs share one.

    Args:
        settings: checked ones.
    """
    container = _container(settings)
    if settings.nodes > 1:
        nodes = [{"targetNodes": "0:", "container": container}]
        kind: dict[str, Any] = {
            "type": "multinode",
            "nodeProperties": {"numNodes": settings.nodes, "mainNode": 0, "nodeRangeProperties": nodes},
        }
    else:
        kind = {"type": "container", "containerProperties": container}
    found: dict[str, Any] = {
        **kind,
        "platformCapabilities": ["EC2"],
        "retryStrategy": _retries(settings),
        "propagateTags": True,
        "tags": dict(settings.tags),
    }
    if (limit := seconds(settings.max_run, "launcher.max_run")) is not None:
        found["timeout"] = {"attemptDurationSeconds": round(limit)}
    if settings.share is not None:
        found["schedulingPriority"] = settings.priority or 0  # a queue with shares takes no job without one
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return {"jobDefinitionName": f"shardwright-{digest}", **found}


def submission(
    settings: BatchLauncher, definition: str, *, run: str, words: Sequence[str], script: str | None, now: datetime
) -> dict[str, Any]:
    """The request SubmitJob.

    Args:
        settings: checked ones.
        definition: name of the job's definition.
        run: its name; jobs with the same one go on from each other's checkpoints.
        words: `key=value`, for the script.
        script: in the image; None: this package's own.
        now: makes the job's name unique.
    """
    own = [] if script is None else [f"--script={script}"]
    command = ["shardwright", "node", f"--processes={settings.processes_now}", *own, *words]
    found: dict[str, Any] = {
        "jobName": job_name(run, now),
        "jobQueue": settings.queue,
        "jobDefinition": definition,
    }
    if settings.nodes > 1:
        every = {"targetNodes": "0:", "containerOverrides": {"command": command}}
        found["nodeOverrides"] = {"nodePropertyOverrides": [every]}
    else:
        found["containerOverrides"] = {"command": command}
    if settings.share is not None:
        found["shareIdentifier"] = settings.share
        if settings.priority is not None:
            found["schedulingPriorityOverride"] = settings.priority
    return found


def job_name(run: str, now: datetime) -> str:
    """The run's, and the time."""
    suffix = f"-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"
    return base_name(run)[: _LONGEST_NAME - len(suffix)] + suffix


def base_name(run: str) -> str:
    """What the names of all jobs of a run begin with."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", run).strip("-_") or "run"


def _container(settings: BatchLauncher) -> dict[str, Any]:
    machine = settings.machine
    asked = {"VCPU": machine.cpus, "MEMORY": machine.memory_gib * 1024, "GPU": machine.gpus}
    shared = settings.shared_memory_gib or max(1, machine.memory_gib // 2)
    linux: dict[str, Any] = {"sharedMemorySize": shared * 1024}
    if machine.efa:
        linux["devices"] = [
            {"hostPath": path, "containerPath": path, "permissions": ["READ", "WRITE", "MKNOD"]}
            for path in (f"/dev/infiniband/uverbs{number}" for number in range(machine.efa))
        ]
    found: dict[str, Any] = {
        "image": settings.image,
        "command": ["shardwright", "node", "--help"],  # each job brings its own
        "environment": [{"name": name, "value": value} for name, value in _environment(settings).items()],
        "resourceRequirements": [{"type": kind, "value": str(value)} for kind, value in asked.items() if value],
        "linuxParameters": linux,
        "ulimits": [{"name": "memlock", "softLimit": -1, "hardLimit": -1}],  # registered memory is locked
    }
    if settings.instance_type is not None and settings.nodes > 1:  # a single one goes where its numbers fit
        found["instanceType"] = settings.instance_type
    if settings.job_role is not None:
        found["jobRoleArn"] = settings.job_role
    if settings.execution_role is not None:
        found["executionRoleArn"] = settings.execution_role
    if settings.secrets:
        found["secrets"] = [{"name": name, "valueFrom": arn} for name, arn in settings.secrets.items()]
    if volumes := settings.mounted:
        found["volumes"] = [each.source() for each in volumes]
        found["mountPoints"] = [each.mount() for each in volumes]
    if settings.log_group is not None:
        found["logConfiguration"] = {"logDriver": "awslogs", "options": {"awslogs-group": settings.log_group}}
    return found


def _environment(settings: BatchLauncher) -> dict[str, str]:
    machine = settings.machine
    found = {"PYTHONUNBUFFERED": "1", "SHARDWRIGHT_GRACE_S": str(_GRACE_S)}
    if machine.gpus:
        # What each rank was doing when a collective timed out.
        found |= {"TORCH_NCCL_TRACE_BUFFER_SIZE": "20000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if machine.efa:
        found["FI_EFA_USE_HUGE_PAGE"] = "0"  # else a fork for data workers may fail for memory
    return found | settings.environment


def _retries(settings: BatchLauncher) -> dict[str, Any]:
    if not settings.restarts:
        return {"attempts": 1}
    wrong = {"onExitCode": str(EXIT_WRONG_INPUT), "action": "EXIT"}
    return {"attempts": settings.restarts + 1, "evaluateOnExit": [wrong, {"onReason": "*", "action": "RETRY"}]}
