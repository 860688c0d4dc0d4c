"""Training jobs of SageMaker, sent with boto3 and nothing else of AWS's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.launch import sagemaker_limits as limits
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob
from trainer.launch.sagemaker_parts import Distribution, Network, Registry, about_old_name, channel, today
from trainer.secrets import redacted, redacted_words

if TYPE_CHECKING:
    from trainer.launch.sagemaker_code import Code

_LONGEST_KEEP_S = 3600
_LONGEST_RUN_S = 28 * 86400


@dataclass(kw_only=True)
class SageMakerLauncher(Launcher):
    """Starts the training script as a training job; the jobs of one run go on from each other's checkpoints."""

    role: str | None = None
    """ARN of the role that the machines take."""
    image: str | None = None
    """Of the container: `registry/name:tag`."""
    region: str | None = None
    """null: as AWS's configuration says."""
    bucket: str | None = None
    """`bucket/prefix` for code, checkpoints and models; a run's lie under `bucket/prefix/<run>`."""
    output: str | None = None
    """`bucket/prefix` for what a job leaves; null: with the run's other files."""
    compressed: bool = True
    """The model as one model.tar.gz, and not as files, which is quicker where it is large."""

    instance_type: str | None = None
    """With or without `ml.`."""
    instance_count: int = 1
    volume_gb: int = 100
    """Disk of each host, where its type brings none."""
    volume_key: str | None = None
    """KMS key for that disk."""
    output_key: str | None = None
    """KMS key for what is put into the bucket."""
    training_plan: str | None = None
    """ARN of reserved capacity."""

    max_run: str = "1d"
    """Longest time that is paid for, such as 90m, 2h or 3d."""
    spot: bool = False
    """Cheaper machines that may be taken away; the job goes on from its checkpoints where it gets others."""
    max_wait: str | None = None
    """Longest time in all, with the waiting for spot machines; null: twice max_run."""
    keep_alive: str | None = None
    """Keep the machines for the next job of the same form, 1 h at most; they are billed. null: give them back."""
    retries: int | None = None
    """Times to start again after an error of SageMaker's own, 1 to 30; null: none."""

    distribution: Distribution = Distribution.torchrun
    processes: int | None = None
    """Of each host; null: one per GPU."""
    max_restarts: int = 0
    """Times to go on after a crash, on the same machines."""
    mpi_options: str = ""
    """Further words for mpirun, such as `-x NAME`."""
    efa: bool | None = None
    """Network past the kernel. null: where the machines have it; true: fail without it; false: leave it alone."""

    code: str | None = None
    """Folder that goes along; null: the script's."""
    dependencies: list[str] = field(default_factory=list)
    """Folders that go along beside it, to be imported by their names."""
    requirements: str | None = None
    """For pip, in the container; null: the folder's requirements.txt, if there is one."""
    channels: dict[str, Any] = field(default_factory=dict)
    """Name -> `s3://...`, or {uri, mode, sharded}, or {file_system, type, path, writable}."""
    environment: dict[str, str] = field(default_factory=dict)
    hyperparameters: dict[str, str] = field(default_factory=dict)
    """Sent by name beside the packed configuration, for people who look at the console."""
    metric_definitions: dict[str, str] = field(default_factory=dict)
    """Name -> regex, beside ours."""
    tags: dict[str, str] = field(default_factory=dict)
    network: Network = field(default_factory=Network)
    registry: Registry = field(default_factory=Registry)
    compiler_config: Any = None
    """Of the Training Compiler, which is no more; only answered."""
    jobs: int | None = None
    """Of a sweep, at the same time; null: all."""

    def __post_init__(self) -> None:
        self._refuse_numbers()
        self._refuse_times()
        if self.compiler_config is not None:
            raise ConfigError(
                "launch: SageMaker's Training Compiler gets no new versions; torch.compile does its work here. Leave "
                "compiler_config out and set compile=true (launcher.compiler_config)."
            )
        if self.distribution_now is not Distribution.torchrun and self.max_restarts:
            raise ConfigError(
                f"launch: max_restarts={self.max_restarts} is torchrun's, mpirun can't go on after a crash. Use "
                "launcher.distribution=torchrun, or launcher.retries (launcher.max_restarts)."
            )
        if self.max_restarts and self.instance_count > 1:
            raise ConfigError(
                f"launch: max_restarts={self.max_restarts} is for one host, and there are {self.instance_count}: the "
                "others would wait for one that begins again. Leave it out (launcher.max_restarts)."
            )
        if self.distribution_now is Distribution.torchrun and self.mpi_options:
            raise ConfigError(
                f"launch: mpi_options={self.mpi_options!r} are for mpirun. Set launcher.distribution=mpi, or leave "
                "them out (launcher.mpi_options)."
            )
        limits.refuse_environment(self.environment)
        limits.refuse_tags(self.tags)
        limits.refuse_hyperparameters(self.hyperparameters)
        limits.refuse_channels(self.channels)

    @property
    def at_once(self) -> int | None:
        return self.jobs

    @property
    def distribution_now(self) -> Distribution:
        """`distribution` without old names."""
        return today(self.distribution)

    @property
    def place(self) -> str:
        """`bucket` as an address.

        Raises:
            ConfigError: there is none.
        """
        return limits.place(self.bucket)

    @property
    def output_place(self) -> str | None:
        """`output` as an address."""
        return None if self.output is None else limits.address(self.output, "launcher.output")

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        from trainer.launch import sagemaker_request

        limits.role(self.role)
        limits.image(self.image)
        kind = limits.instance_type(self.instance_type)
        _ = self.place, self.output_place
        limits.refuse_metrics(sagemaker_request.metrics_of(self))
        found = {name: channel(name, given) for name, given in self.channels.items()}
        for name, each in found.items():
            if each.file_system is not None and not self.network.subnets:
                raise ConfigError(
                    f"launch: the file system {each.file_system} of the channel {name} is reached in a VPC alone. Give "
                    "launcher.network.subnets and launcher.network.security_groups (launcher.network)."
                )
        self._refuse_machine(kind)
        for job in jobs:
            if not job.script.is_file():
                raise ConfigError(f"launch: there is no script {job.script}. Name a file (--script).")
            self.words_of(job)

    def start(self, job: LaunchJob) -> LaunchedJob:
        from trainer.launch.sagemaker_job import Services, SubmittedJob

        services = Services(self.region)
        return SubmittedJob(job, str(self._submitted(job, services)["TrainingJobName"]), services)

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        """A job that was started before, which SageMaker never forgets.

        Args:
            job: what was started.
            handle: the name that SageMaker knows it by.
        """
        from trainer.launch.sagemaker_job import Services, SubmittedJob

        services = Services(self.region)
        return SubmittedJob(job, handle, services) if services.knows(handle) else None

    def run(self, job: LaunchJob) -> int:
        from trainer.launch.sagemaker_follow import follow
        from trainer.launch.sagemaker_job import Services

        for line in self.remarks(job.overrides):
            _tell(line)
        with closing(Services(self.region)) as services:
            return follow(self._submitted(job, services), services, sys.stdout)

    def shown(self, job: LaunchJob) -> str:
        for line in self.remarks(job.overrides):
            _tell(line)
        hidden = LaunchJob(name=job.name, script=job.script, overrides=tuple(redacted_words(job.overrides)))
        return json.dumps(redacted(self.request(hidden, self.packed_code(job))), indent=1)

    def request(self, job: LaunchJob, code: Code) -> dict[str, Any]:
        """What is sent for a job, which `check` found good."""
        from trainer.launch.sagemaker_request import training_job

        return training_job(
            self,
            run=job.name if job.folder is None else f"{job.folder.parent.name}-{job.name}",
            words=self.words_of(job),
            script=code.script,
            code=self.place_of(code),
            now=datetime.now(UTC),
        )

    def place_of(self, code: Code) -> str:
        """Where code lies in the bucket: the same code at the same place."""
        return f"{self.place}/shardwright-code/{code.digest}"

    def packed_code(self, job: LaunchJob, *, for_toolkit: bool | None = None) -> Code:
        """What goes along with a job.

        Args:
            job: whose script it is.
            for_toolkit: SageMaker's toolkit starts it; None: as the distribution says.
        """
        from trainer.launch.sagemaker_code import Source, pack

        source = Source(
            script=job.script,
            folder=None if self.code is None else Path(self.code),
            dependencies=[Path(each) for each in self.dependencies],
            requirements=None if self.requirements is None else Path(self.requirements),
        )
        by_distribution = self.distribution_now is not Distribution.torchrun
        return pack(source, for_toolkit=by_distribution if for_toolkit is None else for_toolkit)

    def remarks(self, words: Sequence[str] = ()) -> list[str]:
        """What a person should know before it costs something.

        Args:
            words: of the job.
        """
        kind, several = limits.instance_type(self.instance_type), self.instance_count > 1
        found = [about_old_name(self.distribution)]
        if several and not limits.has_efa(kind):
            found.append(f"{kind} has no EFA: the {self.instance_count} hosts talk over TCP")
        if several and limits.has_efa(kind) and self.network.subnets and self.efa is not False:
            found.append("EFA in a VPC: a security group must let everything in from itself, and out to itself")
        if self.keep_alive is not None:
            found.append(
                f"warm pool: the machines stay {self.keep_alive} after the job, billed as if it ran. The next job gets "
                "them if its role, instance type and count, volume (size, key), network, encryption and isolation are "
                f"the same; the quota is '{kind} for training warm pool usage', 0 unless raised"
            )
        if self.network.isolated:
            found.append("isolated: nothing can be installed or downloaded, the image must hold it all")
        if secrets := [word.partition("=")[0] for word in words if redacted_words([word]) != [word]]:
            found.append(
                f"{', '.join(secrets)}: whoever may describe the job can read it; better read it from Secrets Manager "
                "in the job"
            )
        return [line for line in found if line is not None]

    def _submitted(self, job: LaunchJob, services: Any) -> dict[str, Any]:
        code = self.packed_code(job)
        request = self.request(job, code)
        services.refuse_second_job(request)
        services.put(self.place_of(code), {"code.tar.gz": code.archive, "start.sh": code.start}, self.output_key)
        services.create(request)
        return request

    def words_of(self, job: LaunchJob) -> list[str]:
        """The job's, with the backend of the launcher's library."""
        words = list(job.overrides)
        if self.distribution_now is not Distribution.smddp:
            return words
        chosen = [word.partition("=")[2] for word in words if word.startswith("backend=")]
        if not chosen:
            return ["backend=smddp", *words]
        if chosen[-1] != "smddp":
            raise ConfigError(
                f"launch: distribution={self.distribution.name} starts the job for backend=smddp, not "
                f"backend={chosen[-1]}. Leave one of them out (launcher.distribution, backend)."
            )
        return words

    def _refuse_numbers(self) -> None:
        for key, least, most in (
            ("instance_count", 1, 1000),
            ("volume_gb", 1, 16384),
            ("processes", 1, 128),
            ("max_restarts", 0, 1000),
            ("retries", 1, 30),
            ("jobs", 1, 1000),
        ):
            value = getattr(self, key)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"launch: {key}={value} is not in {least} to {most} (launcher.{key}).")

    def _refuse_times(self) -> None:
        from trainer.launch.sagemaker_request import max_wait_s, whole_seconds

        run_s = whole_seconds(self.max_run, "launcher.max_run")
        if run_s > _LONGEST_RUN_S:
            raise ConfigError(f"launch: max_run={self.max_run} is more than 28 days (launcher.max_run).")
        if self.max_wait is not None and not self.spot:
            raise ConfigError(
                f"launch: max_wait={self.max_wait} is for spot machines, and spot=false. Set launcher.spot=true, or "
                "leave it out (launcher.max_wait)."
            )
        if self.spot and max_wait_s(self) < run_s:
            raise ConfigError(
                f"launch: max_wait={self.max_wait} is shorter than max_run={self.max_run}, which it includes. Make it "
                "longer (launcher.max_wait)."
            )
        if self.spot and self.training_plan is not None:
            raise ConfigError(
                "launch: spot=true and a training plan are two ways to get machines. Leave one out (launcher.spot, "
                "launcher.training_plan)."
            )
        if self.keep_alive is None:
            return
        if self.spot:
            raise ConfigError(
                f"launch: spot machines can't be kept: spot=true and keep_alive={self.keep_alive}. Leave one out "
                "(launcher.spot, launcher.keep_alive)."
            )
        if whole_seconds(self.keep_alive, "launcher.keep_alive") > _LONGEST_KEEP_S:
            raise ConfigError(
                f"launch: keep_alive={self.keep_alive} is more than an hour, which is the longest. Each job that uses "
                "the machines keeps them anew (launcher.keep_alive)."
            )

    def _refuse_machine(self, kind: str) -> None:
        if self.efa and not limits.has_efa(kind):
            raise ConfigError(
                f"launch: efa=true, and {kind} has none as far as is known here. Take one that has it, such as "
                "ml.p4d.24xlarge or ml.p5.48xlarge, or leave it out (launcher.efa, launcher.instance_type)."
            )
        if self.distribution_now is Distribution.smddp and kind not in limits.WITH_SMDDP:
            raise ConfigError(
                f"launch: SMDDP is for {' and '.join(limits.WITH_SMDDP)}, not {kind}. Use "
                "launcher.distribution=torchrun (launcher.distribution, launcher.instance_type)."
            )


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
