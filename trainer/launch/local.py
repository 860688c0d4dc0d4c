"""Processes of this machine."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.metrics import jsonl
from trainer.sagemaker.hyperparameters import written
from trainer.secrets import redacted_words
from trainer.stop import EXIT_STOPPED

if TYPE_CHECKING:
    from trainer.launch.agent import Meeting

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
_LEAST = (("processes", 1, "--nproc-per-node, "), ("max_restarts", 0, "--max-restarts, "), ("jobs", 1, ""))


@dataclass(kw_only=True)
class LocalLauncher(Launcher):
    """Starts the training script in several processes of this machine, with torchrun's own machinery."""

    processes: int | None = None
    """Of one job; null: one per GPU, or 2."""
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
        return _LocalJob(job, self)

    def run(self, job: LaunchJob) -> int:
        return launch_local(job.script, job.overrides, self.num_processes(), self.max_restarts)

    def num_processes(self) -> int:
        """Of one job on this machine."""
        import torch

        return self.processes or torch.cuda.device_count() or 2


class _LocalJob(LaunchedJob):
    """A launcher of its own in the background; what it says lies in a file of the run's folder."""

    def __init__(self, job: LaunchJob, launcher: LocalLauncher) -> None:
        assert job.folder is not None
        self.job = job
        self._said = job.folder / "logs" / "launch.log"
        self._said.parent.mkdir(parents=True, exist_ok=True)
        words = [f"launcher.processes={launcher.num_processes()}", f"launcher.max_restarts={launcher.max_restarts}"]
        words += ["--script", str(job.script), f"run.dir={written(str(job.folder))}", *job.overrides]
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "launch.py"), *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the sweep, which passes it on
            )

    def status(self) -> Status:
        code = self._process.poll()
        metrics = self._metrics()
        if code is None:
            return Status(state=State.running if metrics else State.waiting, metrics=metrics)
        if code in (0, EXIT_STOPPED):
            return Status(state=State.stopped if code else State.finished, metrics=metrics)
        return Status(state=State.failed, detail=self._reason() or f"exit code {code}", metrics=metrics)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _metrics(self) -> dict[str, float]:
        assert self.job.folder is not None
        return newest_metrics(self.job.folder)

    def _reason(self) -> str:
        """The line that says why it failed, or the last one."""
        lines = [line.strip() for line in self._said.read_text(errors="replace").splitlines() if line.strip()]
        return next(
            (line for line in lines if line.startswith(("ConfigError:", "TrainingError:"))), "".join(lines[-1:])
        )


def newest_metrics(folder: Path) -> dict[str, float]:
    """The newest value of each number that a run has written down; empty: none yet."""
    found: dict[str, float] = {}
    for line in jsonl.read(folder / "metrics.jsonl"):
        found |= line
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
