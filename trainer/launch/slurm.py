"""Batch jobs of Slurm, handed over with its own sbatch: on a cluster of one's own, ParallelCluster or HyperPod."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from strategies.errors import ConfigError
from trainer.launch import slurm_limits as limits
from trainer.launch.base import ArrayLauncher, LaunchedJob, LaunchJob
from trainer.launch.slurm_job import SlurmJob
from trainer.launch.slurm_queue import Queue
from trainer.launch.slurm_script import Batch, Option, Run
from trainer.sagemaker.hyperparameters import written

_OURS = Path(__file__).resolve().parent.parent.parent
_MOST_NODES = 10_000
_LONGEST_NAME = 100


@dataclass(kw_only=True)
class SlurmLauncher(ArrayLauncher):
    """Starts the training script as a batch job, which goes on in a new turn when its time is up."""

    nodes: int = 1
    processes: int | None = None
    """Of each node; null: as many as GPUs are asked for."""
    gpus_per_node: int | None = None
    """null: none are asked for, and the processes see what a node shows them."""
    cpus_per_process: int | None = None
    """null: as the cluster does it."""
    exclusive: bool = False
    """Whole nodes, shared with nobody."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features of the nodes, such as `p5` or `a100|h100`."""
    time: str | None = None
    """Longest time of one turn, such as 90m, 4h, 1d or 1-12:00:00; null: the partition's."""
    stop_before: str = "5m"
    """How long before that the job is told to write a checkpoint and to leave its place."""
    max_requeues: int = 100
    """Times that it goes on in a new turn: after its time, after the failure of a node."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, name -> value; an empty one has none, as in `{mem: 0, reservation: mine}`."""
    srun: dict[str, str] = field(default_factory=dict)
    """Further options of srun."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the start, such as `module load cuda`; one that fails ends the job."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those of this terminal, which sbatch passes on."""
    python: str | None = None
    """null: this one; in a container: python3."""
    container_image: str | None = None
    """For pyxis: a squashfs file, or registry#name:tag."""
    container_mounts: list[str] = field(default_factory=list)
    """`/from:/to`; the working folder, the run's and the script's are mounted by themselves."""
    jobs: int | None = None
    """Of a sweep, at the same time; null: as many as Slurm lets run."""

    def __post_init__(self) -> None:
        for key, least, most in (
            ("nodes", 1, _MOST_NODES),
            ("processes", 1, 1024),
            ("gpus_per_node", 1, 1024),
            ("cpus_per_process", 1, 1024),
            ("max_requeues", 0, 10_000),
            ("jobs", 1, 10_000),
        ):
            value = getattr(self, key)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"launch: {key}={value} is not in {least} to {most} (launcher.{key}).")
        if self.processes and self.gpus_per_node and self.processes > self.gpus_per_node:
            raise ConfigError(
                f"launch: processes={self.processes} of a node have gpus_per_node={self.gpus_per_node}, and each takes "
                "one. Ask for as many, or leave processes out (launcher.processes, launcher.gpus_per_node)."
            )
        for key in ("partition", "account", "qos", "constraint"):
            limits.name(key, getattr(self, key))
        if self.time is not None:
            limits.whole_seconds(self.time, "launcher.time")
        limits.refuse_stop_before(self.time, self.stop_before)
        limits.refuse_options(self.sbatch, "sbatch")
        limits.refuse_options(self.srun, "srun")
        limits.refuse_setup(self.setup)
        limits.refuse_environment(self.environment)
        limits.refuse_container(self.container_image, self.container_mounts)
        self._queue = Queue()

    @property
    def at_once(self) -> int | None:
        return self.jobs

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        if self.processes is None and self.gpus_per_node is None:
            raise ConfigError(
                "launch: how many processes has a node? Ask for GPUs, one process for each, as in "
                "launcher.gpus_per_node=8, or say it (launcher.gpus_per_node, launcher.processes)."
            )
        for job in jobs:
            if not job.script.is_file():
                raise ConfigError(f"launch: there is no script {job.script}. Name a file (--script).")
            limits.refuse_secrets(job.overrides)
            for word in job.overrides:
                if re.match(r"[+]*run\.(name|dir)=.*\$\{", word):
                    raise ConfigError(
                        f"launch: where is {word}? The job's log lies with it, so it has to be known before. Write it "
                        "out (run.dir)."
                    )
            limits.refuse_path(self._folder(job), "run.dir")

    def shown(self, job: LaunchJob) -> str:
        return self.batch([job]).text().rstrip("\n")

    def shown_array(self, jobs: Sequence[LaunchJob]) -> str:
        return self.batch(jobs, array=True).text().rstrip("\n")

    def start(self, job: LaunchJob) -> LaunchedJob:
        self._queue.refuse_none()
        batch = self.batch([job])
        return self._submitted(job, self._queue.submit(batch), batch)

    def start_array(self, jobs: Sequence[LaunchJob]) -> Sequence[LaunchedJob]:
        self._queue.refuse_none()
        batch = self.batch(jobs, array=True)
        number = self._queue.submit(batch)
        return [self._submitted(job, f"{number}_{index}", batch) for index, job in enumerate(jobs)]

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        if not re.fullmatch(r"\d+(_\d+)?", handle):
            return None
        batch = self.batch([job], array="_" in handle)
        seen = self._queue.look(handle)
        if seen is not None and seen.name not in ("", batch.name):  # a cluster that counts from the beginning again
            return None
        return self._submitted(job, handle, batch)

    def run(self, job: LaunchJob) -> int:
        from trainer.launch.following import follow_until_end, screen_for
        from trainer.launch.slurm_follow import SlurmWatch

        self._queue.refuse_none()
        batch = self.batch([job])
        number = self._at_work(batch)
        handle = number or self._queue.submit(batch)
        screen, log = screen_for(sys.stdout), batch.log_of(handle)
        return follow_until_end(
            SlurmWatch(self._submitted(job, handle, batch), log, screen, from_end=number is not None)
        )

    def _at_work(self, batch: Batch) -> str | None:
        """The number of this same job, if Slurm has it still; two of them would write into one folder.

        Raises:
            ConfigError: it has another one of the same run.
        """
        scripts = {int(path.stem.partition("-")[2]): path for path in batch.logs.glob("slurm-*.sh")}
        for number, path in sorted(scripts.items(), reverse=True)[:1]:
            seen = self._queue.look(str(number), patience_s=0.0)
            if seen is None or seen.is_over or seen.name not in ("", batch.name):
                return None
            if path.read_text() == batch.text():
                return str(number)
            raise ConfigError(
                f"launch: job {number} of this run is {seen.state}, with other settings. Stop it, as in scancel "
                f"--signal=TERM {number}, wait for its end, and start again; or choose another folder (run.dir)."
            )
        return None

    def _submitted(self, job: LaunchJob, handle: str, batch: Batch) -> SlurmJob:
        return SlurmJob(job, handle, self._queue, self._folder(job), batch.log_of(handle))

    def batch(self, jobs: Sequence[LaunchJob], *, array: bool = False) -> Batch:
        """What is submitted for jobs which `check` found good.

        Args:
            jobs: one, or those of an array.
            array: also for one.
        """
        runs = [Run(name=job.name, folder=self._folder(job), words=self._words(job)) for job in jobs]
        folder = runs[0].folder.parent if array else runs[0].folder
        name = re.sub(r"[^\w+-]+", "-", folder.name if array else runs[0].name).strip("-")[:_LONGEST_NAME] or "run"
        batch = Batch(
            name=name,
            runs=runs,
            array=array,
            logs=folder / "logs",
            options=[],
            srun=[],
            script=jobs[0].script.resolve(),
            python=self.python or ("python3" if self.container_image else sys.executable),
            here=Path.cwd(),
            setup=self.setup,
            environment=self.environment,
            processes=self._num_processes(),
            cpus_per_process=self.cpus_per_process,
            grace_s=limits.whole_seconds(self.stop_before, "launcher.stop_before"),
            max_requeues=self.max_requeues,
        )
        return replace(batch, options=self._sbatch_options(batch), srun=self._srun_options(batch))

    def _num_processes(self) -> int:
        found = self.processes or self.gpus_per_node
        assert found is not None
        return found

    def _folder(self, job: LaunchJob) -> Path:
        return (job.folder or job.run_dir or Path("runs") / job.name).absolute()

    def _words(self, job: LaunchJob) -> tuple[str, ...]:
        """The job's, with its folder: that of the next turn too, whatever becomes of the name's ingredients."""
        return (*job.overrides, f"run.dir={written(str(self._folder(job)))}", "run.name=null")

    def _sbatch_options(self, batch: Batch) -> list[Option]:
        found: list[Option] = [
            ("job-name", batch.name),
            ("nodes", str(self.nodes)),
            ("ntasks-per-node", str(self._num_processes())),
            *self._sized(),
            *((key, getattr(self, key)) for key in ("partition", "account", "qos", "constraint")),
        ]
        if self.time is not None:
            found.append(("time", limits.as_slurm(limits.whole_seconds(self.time, "launcher.time"))))
        found = [option for option in found if option[1] is not None]
        if self.exclusive:
            found.append(("exclusive", None))
        if batch.array:
            most = "" if self.jobs is None else f"%{self.jobs}"
            found.append(("array", f"0-{len(batch.runs) - 1}{most}"))
        found += [("output", batch.log), ("open-mode", "append"), ("signal", f"B:USR1@{batch.grace_s}")]
        found.append(("requeue" if self.max_requeues else "no-requeue", None))
        return found + _further(self.sbatch)

    def _srun_options(self, batch: Batch) -> list[Option]:
        found: list[Option] = [
            *([] if self.cpus_per_process is None else [("cpus-per-task", str(self.cpus_per_process))]),
            *(("kill-on-bad-exit", "1"), ("wait", "0"), ("export", "ALL")),
        ]
        if self.container_image is not None:
            mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in self.container_mounts]
            found += [
                ("container-image", self.container_image),
                ("container-mounts", ",".join([*mounts, *self._own_mounts(batch, mounts)])),
                ("container-workdir", str(batch.here)),
            ]
        return found + _further(self.srun)

    def _own_mounts(self, batch: Batch, given: Sequence[str]) -> list[str]:
        """Folders that the job needs at their own places, unless they are there already."""
        ours = [_OURS] if batch.script.is_relative_to(_OURS) else [batch.script.parent]
        there = [Path(mount.split(":")[1]) for mount in given]
        found: list[Path] = []
        for folder in (batch.here, batch.logs.parent, *ours):
            if not any(folder.is_relative_to(each) for each in (*there, *found)):
                if re.search(r"[:,\s]", str(folder)):
                    raise ConfigError(
                        f"launch: {str(folder)!r} can't be mounted, since pyxis reads : and , for itself. Choose "
                        "another folder (launcher.container_mounts)."
                    )
                found.append(folder)
        return [f"{folder}:{folder}" for folder in found]

    def _sized(self) -> list[Option]:
        sizes = {"cpus-per-task": self.cpus_per_process, "gpus-per-node": self.gpus_per_node}
        return [(name, str(value)) for name, value in sizes.items() if value is not None]


def _further(given: dict[str, str]) -> list[Option]:
    return [(name, value or None) for name, value in given.items()]
