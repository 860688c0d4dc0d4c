"""Multi-node jobs of AWS Batch, sent with boto3."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.launch import containers
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob
from trainer.launch.batch_request import Volume, volume
from trainer.launch.instances import Instance, devices, instance
from trainer.secrets import redacted, redacted_words
from trainer.stop import seconds

if TYPE_CHECKING:
    from trainer.launch.batch_job import BatchJob, Services

_NUMBERS = (("nodes", 1, 1000), ("processes", 1, 128), ("gpus", 0, 128), ("efa", 0, 128), ("vcpus", 1, 1024),
            ("memory_gib", 1, 32768), ("shared_memory_gib", 1, 32768), ("restarts", 0, 9), ("jobs", 1, 1000),
            ("priority", 0, 9999))  # fmt: skip
_LONGEST_TEXT = 8192
"""Of a job's words in all; the service's limit for what is overridden."""


@dataclass(kw_only=True)
class BatchLauncher(Launcher):
    """Starts the training script on one or several machines of a compute environment of AWS Batch."""

    queue: str | None = None
    """Name or ARN of the job queue."""
    image: str | None = None
    """Of the container, with this package in it: `registry/name:tag`."""
    region: str | None = None
    """null: as AWS's configuration says."""

    nodes: int = 1
    processes: int | None = None
    """Of each node; null: one per GPU, or 1 without GPUs."""
    instance_type: str | None = None
    """Of the machines, without `ml.`; one job takes a whole machine each."""
    gpus: int | None = None
    """Of each node; null: all that the type has."""
    efa: int | None = None
    """EFA interfaces of each node; null: all that the type has, where there are several nodes."""
    vcpus: int | None = None
    """null: all that the type has."""
    memory_gib: int | None = None
    """null: what the type has, less a tenth for the system."""
    shared_memory_gib: int | None = None
    """Of /dev/shm; null: half of the memory."""

    job_role: str | None = None
    """ARN of the role that the training has, for S3 and the like."""
    execution_role: str | None = None
    """ARN of the role that fetches image and secrets."""
    volumes: dict[str, Any] = field(default_factory=dict)
    """Name -> {host, path, read_only} for a folder of the machine, or {efs, path, root, read_only}."""
    run_root: str | None = None
    """Folder on one of the volumes for the runs' folders; null: as run.dir and checkpoint.folder say."""
    script: str | None = None
    """Where a script of your own lies in the image, from / on."""
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    """Variable -> ARN in Secrets Manager or the Parameter Store; the value never comes here."""
    tags: dict[str, str] = field(default_factory=dict)
    log_group: str | None = None
    """Of CloudWatch; null: Batch's own, /aws/batch/job."""

    restarts: int = 3
    """Times that all nodes begin again after a failure, from the newest checkpoint; not after wrong input."""
    max_run: str | None = None
    """Longest time of one attempt, such as 12h; null: no limit."""
    priority: int | None = None
    """Among jobs of the same share, where the queue has a scheduling policy."""
    share: str | None = None
    """Share identifier, where the queue has a scheduling policy."""
    jobs: int | None = None
    """Of a sweep, at the same time; null: all."""

    def __post_init__(self) -> None:
        containers.refuse_numbers(self, _NUMBERS)
        limit = seconds(self.max_run, "launcher.max_run")
        if limit is not None and limit < 60:
            raise ConfigError(f"launch: max_run={self.max_run} is below a minute, Batch's least (launcher.max_run).")
        if self.instance_type is not None and self.instance_type.startswith("ml."):
            raise ConfigError(
                f"launch: instance_type={self.instance_type} is SageMaker's name. Leave ml. out "
                "(launcher.instance_type)."
            )
        if self.instance_type is not None and not re.fullmatch(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", self.instance_type):
            raise ConfigError(
                f"launch: instance_type={self.instance_type} is no type of EC2's. Write it as in p4d.24xlarge "
                "(launcher.instance_type)."
            )
        if self.priority is not None and self.share is None:
            raise ConfigError(
                f"launch: priority={self.priority} counts among jobs of one share, and none is named. Name it, or "
                "leave the priority out (launcher.priority, launcher.share)."
            )
        self._refuse_names()

    @property
    def at_once(self) -> int | None:
        return self.jobs

    @property
    def per_node(self) -> tuple[int, int]:
        """GPUs and EFA interfaces of each node.

        Raises:
            ConfigError: they aren't known, or the type hasn't so many.
        """
        return devices(self.instance_type, self.gpus, self.efa, self.nodes)

    @property
    def processes_now(self) -> int:
        """Of each node."""
        return self.processes or max(1, self.per_node[0])

    @property
    def machine(self) -> Instance:
        """What is asked for on each node.

        Raises:
            ConfigError: the type isn't known, and not everything is given.
        """
        known, (gpus, efa) = instance(self.instance_type), self.per_node
        for key, least in (("vcpus", known and known.cpus), ("memory_gib", known and known.memory_gib)):
            given = getattr(self, key)
            if given is None and least is None:
                raise ConfigError(
                    f"launch: what {self.instance_type or 'a machine'} has isn't known here. Say it (launcher.{key})."
                )
            if given is not None and least is not None and given > least:
                raise ConfigError(
                    f"launch: {key}={given}, and {self.instance_type} has {least}. Take less (launcher.{key})."
                )
        cpus = self.vcpus or (known.cpus if known else 0)
        return Instance(gpus, efa, cpus, self.memory_gib or (known.memory_gib * 9 // 10 if known else 0))

    @property
    def mounted(self) -> list[Volume]:
        """`volumes`, read."""
        return [volume(name, given) for name, given in self.volumes.items()]

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        if self.queue is None:
            raise ConfigError("launch: which queue? Give the name of a job queue of AWS Batch (launcher.queue).")
        containers.image(self.image)
        machine = self.machine
        if self.processes is not None and machine.gpus and self.processes > machine.gpus:
            raise ConfigError(
                f"launch: processes={self.processes}, and a node has {machine.gpus} GPUs. Take one process per GPU "
                "(launcher.processes, launcher.gpus)."
            )
        if self.shared_memory_gib is not None and self.shared_memory_gib >= machine.memory_gib:
            raise ConfigError(
                f"launch: shared_memory_gib={self.shared_memory_gib} of {machine.memory_gib} GiB leaves none. Take "
                "less (launcher.shared_memory_gib)."
            )
        for job in jobs:
            if not job.script.is_file():
                raise ConfigError(f"launch: there is no script {job.script}. Name a file (--script).")
            self.words_of(job)
            containers.script_in_image(job, self.script, None)

    def shown(self, job: LaunchJob) -> str:
        self._tell(job)
        hidden = LaunchJob(
            name=job.name, script=job.script, overrides=tuple(redacted_words(job.overrides)), folder=job.folder
        )
        definition, submission = self.requests(hidden)
        return json.dumps(redacted({"RegisterJobDefinition": definition, "SubmitJob": submission}), indent=1)

    def start(self, job: LaunchJob) -> LaunchedJob:
        from trainer.launch.batch_job import Services

        return self._submitted(job, Services(self.region))

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        """A job that was started before, which Batch keeps for a week after its end.

        Args:
            job: what was started.
            handle: its number at Batch.
        """
        from trainer.launch.batch_job import BatchJob, Services

        services = Services(self.region)
        return BatchJob(job, handle, services) if services.describe(handle) is not None else None

    def run(self, job: LaunchJob) -> int:
        from trainer.launch.batch_follow import follow
        from trainer.launch.batch_job import Services

        self._tell(job)
        with closing(Services(self.region)) as services:
            return follow(self._submitted(job, services), sys.stdout)

    def requests(self, job: LaunchJob) -> tuple[dict[str, Any], dict[str, Any]]:
        """RegisterJobDefinition and SubmitJob for a job, which `check` found good."""
        from trainer.launch.batch_request import job_definition, submission

        definition = job_definition(self)
        return definition, submission(
            self,
            definition["jobDefinitionName"],
            run=_run_of(job),
            words=self.words_of(job),
            script=containers.script_in_image(job, self.script, None),
            now=datetime.now(UTC),
        )

    def words_of(self, job: LaunchJob) -> list[str]:
        """The job's, with the run's folder on a volume.

        Raises:
            ConfigError: some of them don't fit.
        """
        containers.refuse_flags(job.overrides)
        paths = [volume.path for volume in self.mounted]
        words = containers.words_in_image(job.overrides, _run_of(job), self.run_root, paths)
        for word in words:
            if "Ref::" in word:
                raise ConfigError(f"launch: AWS Batch puts something else in the place of Ref::... in {word} ({word}).")
        if (length := sum(map(len, words))) > _LONGEST_TEXT - 1024:
            raise ConfigError(
                f"launch: the job's words have {length} characters, AWS Batch takes {_LONGEST_TEXT - 1024}. Put them "
                "into an experiment in the image (experiment)."
            )
        return words

    def remarks(self, job: LaunchJob) -> list[str]:
        """What a person should know before it costs something."""
        paths = [volume.path for volume in self.mounted]
        found = containers.shared_remarks(
            job, self.words_of(job), "better keep it in Secrets Manager (launcher.secrets)", paths
        )
        if self.nodes > 1 and not self.machine.efa:
            known = instance(self.instance_type)
            has = f"{self.instance_type} has no EFA" if known is not None and not known.efa else "no EFA is asked for"
            found.append(f"{has}: the {self.nodes} nodes talk over TCP")
        if self.machine.efa:
            found.append(
                "EFA: the compute environment needs a launch template with its interfaces, a placement group, and a "
                "security group that lets everything in from itself, and out to itself"
            )
        return found

    def _tell(self, job: LaunchJob) -> None:
        for line in self.remarks(job):
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _submitted(self, job: LaunchJob, services: Services) -> BatchJob:
        from trainer.launch.batch_job import BatchJob

        definition, request = self.requests(job)
        services.refuse_second_job(request)
        services.define(definition)
        return BatchJob(job, services.submit(request), services)

    def _refuse_names(self) -> None:
        queue = r"[A-Za-z0-9_-]{1,128}|arn:aws[a-z-]*:batch:[a-z0-9-]+:\d{12}:job-queue/[A-Za-z0-9_-]{1,128}"
        if self.queue is not None and not re.fullmatch(queue, self.queue):
            raise ConfigError(f"launch: queue={self.queue} is no name or ARN of a job queue (launcher.queue).")
        for key in ("job_role", "execution_role"):
            arn = getattr(self, key)
            if arn is not None and not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", arn):
                raise ConfigError(
                    f"launch: {key}={arn} is no role's ARN. Write it as in arn:aws:iam::123456789012:role/training "
                    f"(launcher.{key})."
                )
        containers.refuse_environment(self.environment, self.secrets)
        for name, arn in self.secrets.items():
            if not re.fullmatch(r"arn:aws[a-z-]*:(secretsmanager|ssm):[a-z0-9-]+:\d{12}:\S+", arn):
                raise ConfigError(
                    f"launch: {name} is read from where? Give the ARN of a secret of Secrets Manager or of a parameter "
                    f"of the Parameter Store; the value itself stays there (launcher.secrets.{name})."
                )
        if self.secrets and self.execution_role is None:
            raise ConfigError(
                "launch: secrets are fetched by the execution role, and none is given. Give its ARN "
                "(launcher.execution_role)."
            )
        from trainer.launch.sagemaker_limits import refuse_tags

        refuse_tags(self.tags)
        paths = [volume.path for volume in self.mounted]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise ConfigError(f"launch: two volumes at {twice}. Choose another path for one (launcher.volumes).")
        if self.run_root is not None and not self.run_root.startswith("/"):
            raise ConfigError(f"launch: run_root={self.run_root} isn't written from / on (launcher.run_root).")


def _run_of(job: LaunchJob) -> str:
    return job.name if job.folder is None else f"{job.folder.parent.name}-{job.name}"
