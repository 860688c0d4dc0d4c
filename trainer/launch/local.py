"""Processes of this machine."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob
from trainer.launch.local_job import LocalJob
from trainer.secrets import redacted_words

if TYPE_CHECKING:
    from trainer.launch.agent import Meeting

_LEAST = (("processes", 1, "--nproc-per-node, "), ("max_restarts", 0, "--max-restarts, "), ("jobs", 1, ""))


@dataclass(kw_only=True)
class LocalLauncher(Launcher):
    """Starts the training script in several processes of this machine, with torchrun's own machinery."""

    processes: int | None = None
    """Of one job; null: one per GPU, or 2. Of several jobs at a time each has its part of the GPUs."""
    max_restarts: int = 0
    """Times to go on after a crash."""
    jobs: int = 1
    """Of a sweep, at the same time."""

    def __post_init__(self) -> None:
        for key, least, flag in _LEAST:
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(
                    f"launch: {key}={value} is below {least}. Give {least} or more ({flag}launcher.{key})."
                )
        self._started: list[LocalJob] = []

    @property
    def at_once(self) -> int:
        return self.jobs

    def check(self, jobs: Sequence[LaunchJob]) -> None:
        for job in jobs:
            if not job.script.is_file():
                raise ConfigError(f"launch: there is no script {job.script}. Name a file (--script).")

    def shown(self, job: LaunchJob) -> str:
        words = [sys.executable, "-u", str(job.script), *redacted_words(job.overrides)]
        times = "" if self.max_restarts == 0 else f", again after a crash up to {self.max_restarts} times"
        return f"{self.num_processes()} processes of this machine{times}: {shlex.join(words)}"

    def start(self, job: LaunchJob) -> LaunchedJob:
        self._started = [each for each in self._started if not each.status().state.over]
        taken = {each.place for each in self._started}
        place = next(number for number in itertools.count() if number not in taken)
        processes = self.num_processes()
        words = [f"launcher.processes={processes}", f"launcher.max_restarts={self.max_restarts}"]
        self._started.append(LocalJob.begun(job, words, self._part_of_machine(place, processes), place))
        return self._started[-1]

    def find(self, job: LaunchJob, handle: str) -> LaunchedJob | None:
        found = LocalJob.found(job, handle)
        if found is not None:
            self._started.append(found)
        return found

    def run(self, job: LaunchJob) -> int:
        return launch_local(job.script, job.overrides, self.num_processes(), self.max_restarts)

    def num_processes(self) -> int:
        """Of one job on this machine."""
        import torch

        gpus = torch.cuda.device_count()
        return self.processes or (max(1, gpus // self.jobs) if gpus else 2)

    def _part_of_machine(self, place: int, processes: int) -> dict[str, str]:
        """Variables that keep jobs which run at the same time out of each other's way.

        Args:
            place: 0, 1, ...; no other job that runs has the same.
            processes: of one job.
        """
        import torch

        threads = max(1, (os.cpu_count() or 1) // (processes * self.jobs))
        found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        gpus = torch.cuda.device_count()
        if self.jobs > 1 and processes < gpus:  # more jobs than there are parts: they share
            named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            found["CUDA_VISIBLE_DEVICES"] = ",".join(named[(place * processes + i) % gpus] for i in range(processes))
        return found


def launch_local(
    script: Path, arguments: Sequence[str], processes: int, max_restarts: int, meeting: Meeting | None = None
) -> int:
    """Run `script` in `processes` workers of this machine and wait for them.

    A signal to this process (Ctrl-C, SIGTERM) is passed on to the workers, which have ten minutes to
    write a checkpoint; a second one ends them.

    Args:
        script: the training script.
        arguments: its words.
        processes: workers on this machine.
        max_restarts: times to go on after a crash.
        meeting: of this machine and others that run the same; None: it is alone.

    Returns:
        0, or the exit code of the first worker that failed; 128 + the signal's number where a signal ended it.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

    from trainer.launch.agent import LEAVE_S, Agent, Meeting, shell_code, telling

    logging.disable(logging.ERROR)  # the workers say what is wrong; torchrun's report would only bury that line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("SHARDWRIGHT_GRACE_S", str(LEAVE_S))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # where a rank is gone, each socket says so in 30 lines
    os.environ["SHARDWRIGHT_LAUNCHER"] = str(os.getpid())
    spec = WorkerSpec(
        role="worker",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", str(script), *arguments),
        rdzv_handler=meeting or Meeting.here(uuid.uuid4().hex),
        max_restarts=max_restarts,
        monitor_interval=0.2,
    )
    agent = Agent(spec, DefaultLogsSpecs())
    try:
        failures = agent.run().failures.values()
    except SignalException as error:
        return agent.exit_code(otherwise=128 + int(error.sigval))
    finally:
        logging.disable(logging.NOTSET)
    return shell_code(telling(failure.exitcode for failure in failures))
