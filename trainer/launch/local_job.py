"""A job in the background of this machine; what it says lies in a file of the run's folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from trainer.launch.base import LaunchedJob, LaunchJob, State, Status
from trainer.metrics.events import Event, read_events
from trainer.metrics.follow import Follower
from trainer.sagemaker.hyperparameters import written
from trainer.stop import EXIT_STOPPED

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
_BEGUN = "--- "
"""Before the time of each start."""
_HANDLE = re.compile(r"(\d+) of ([\d.]+), place (\d+)")


class LocalJob(LaunchedJob):
    """A launcher of its own in another process, which may have been started by a process that is gone."""

    def __init__(
        self, job: LaunchJob, number: int, since: float, place: int, child: subprocess.Popen[bytes] | None
    ) -> None:
        """See `begun` and `found`.

        Args:
            job: what runs.
            number: of the process.
            since: when that was started, which tells it from later ones of the same number.
            place: which part of the machine it has.
            child: None: somebody else started it.
        """
        assert job.folder is not None
        self.job = job
        self.place = place
        self._folder = job.folder
        self._number, self._since, self._child = number, since, child
        self._asked = False
        self._lines = Follower(job.folder / "metrics.jsonl")

    @classmethod
    def begun(cls, job: LaunchJob, launcher: Sequence[str], variables: Mapping[str, str], place: int) -> LocalJob:
        """Start it.

        Args:
            job: what to run.
            launcher: `launcher.key=value` words.
            variables: for its environment.
            place: which part of the machine it gets.
        """
        assert job.folder is not None
        said = _said(job.folder)
        said.parent.mkdir(parents=True, exist_ok=True)
        words = [*launcher, "--script", str(job.script), f"run.dir={written(str(job.folder))}", *job.overrides]
        with said.open("ab") as file:
            file.write(f"{_BEGUN}{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
            file.flush()
            child = subprocess.Popen(
                [sys.executable, str(SCRIPTS / "launch.py"), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,  # a Ctrl-C is for the sweep, which passes it on
            )
        return cls(job, child.pid, psutil.Process(child.pid).create_time(), place, child)

    @classmethod
    def found(cls, job: LaunchJob, handle: str) -> LocalJob | None:
        """The one that an earlier process has started; None: `handle` is none of ours."""
        known = _HANDLE.fullmatch(handle)
        return known and cls(job, int(known[1]), float(known[2]), int(known[3]), None)

    @property
    def handle(self) -> str:
        return f"{self._number} of {self._since}, place {self.place}"

    def status(self) -> Status:
        if self._child is None:
            state, detail = self._noted()
        else:
            code = self._child.poll()
            state = State.running if code is None else _STATES.get(code, State.failed)
            if self._asked and code in _KILLED:  # before it listened, or at the second time
                state = State.stopped
            detail = f"exit code {code}"
        self._lines.look()
        metrics, curves = self._lines.newest, self._lines.curves
        if state is State.running and not metrics:
            state = State.waiting
        why = (self._reason() or detail) if state is State.failed else ""
        return Status(state=state, detail=why, metrics=metrics, curves=curves)

    def stop(self) -> None:
        self._asked = True
        if self._child is not None:
            if self._child.poll() is None:
                self._child.send_signal(signal.SIGTERM)
        elif self._lives():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._number, signal.SIGTERM)

    def _lives(self) -> bool:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._number)
            return bool(process.create_time() == self._since and process.status() != psutil.STATUS_ZOMBIE)
        return False

    def _noted(self) -> tuple[State, str]:
        """The state of somebody else's child, whose exit code nobody can ask for, and why it failed."""
        if self._lives():
            return State.running, ""
        edges = [event for event in read_events(self._folder) if event["event"] in ("start", "end")]
        edges = [event for event in edges if _time(event) >= int(self._since)]
        if edges and edges[-1]["event"] == "end":
            state = {"finished": State.finished, "stopped": State.stopped}.get(str(edges[-1].get("outcome")))
            return state or State.failed, str(edges[-1].get("reason", ""))
        return State.stopped, ""  # killed, with its launcher or the machine: what it has saved is there

    def _reason(self) -> str:
        """The line of the newest start that says why it failed, or the last one."""
        newest = _said(self._folder).read_text(errors="replace").rpartition(f"\n{_BEGUN}")[2]
        lines = [line.strip() for line in newest.splitlines()[1:] if line.strip()]
        return next(
            (line for line in lines if line.startswith(("ConfigError:", "TrainingError:"))), "".join(lines[-1:])
        )


_STATES = {0: State.finished, EXIT_STOPPED: State.stopped}
_KILLED = {code for number in (signal.SIGTERM, signal.SIGKILL) for code in (-number, 128 + number)}


def _said(folder: Path) -> Path:
    return folder / "logs" / "launch.log"


def _time(event: Event) -> float:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return 0.0
