"""A job that Slurm has, and what is known of it from its log and its run's folder."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.launch.base import LaunchedJob, LaunchJob, State, Status
from trainer.launch.slurm_queue import PATIENCE_S, Queue, Seen
from trainer.metrics.events import read_events
from trainer.metrics.follow import Follower

_BEGUN = "--- "
"""Before each start in a job's log; the script writes it."""
_TAIL_BYTES = 1 << 16
_ENDURE_S = 600.0
"""How long a sweep goes on without an answer of Slurm's; its jobs do too."""
_WORDS = {
    "CANCELLED": "cancelled",
    "PREEMPTED": "a job of higher priority took its place",
    "TIMEOUT": "it didn't stop before its time was up; give it more (launcher.stop_before)",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node didn't start",
    "OUT_OF_MEMORY": "out of memory; ask for more, as in launcher.sbatch.mem=0 for all of a node",
    "DEADLINE": "its deadline passed",
}


class SlurmJob(LaunchedJob):
    """A job that Slurm has."""

    def __init__(self, job: LaunchJob, handle: str, queue: Queue, folder: Path, log: Path) -> None:
        """It was submitted before.

        Args:
            job: what runs.
            handle: `12`, or `12_3` of an array.
            queue: where it is.
            folder: the run's.
            log: Slurm's of this job.
        """
        self.job = job
        self._handle, self._queue, self._folder, self._log = handle, queue, folder, log
        self._asked = 0
        self._last: Seen | None = None
        self._lines = Follower(folder / "metrics.jsonl")

    @property
    def handle(self) -> str:
        return self._handle

    def status(self) -> Status:
        seen = self.seen(endure_s=_ENDURE_S)
        self._lines.look()
        state = seen.as_state()
        detail = "" if state.over else seen.detail
        if state is State.failed:
            detail = words_for(seen) or reason(self._log)
        return Status(state=state, detail=detail, metrics=self._lines.newest, curves=self._lines.curves)

    def seen(self, patience_s: float = PATIENCE_S, endure_s: float = 0.0) -> Seen:
        """What Slurm says, or the run's own notes where it has forgotten the job.

        Args:
            patience_s: an answer as old as this will do.
            endure_s: the same where no newer one is to be had.

        Raises:
            ConfigError: Slurm can't be asked.
        """
        if self._last is None or not self._last.is_over:
            self._last = self._queue.look(self._handle, patience_s, endure_s) or noted(self._folder)
        return self._last

    def stop(self) -> None:
        self._asked += 1
        if self._asked == 1:
            self._queue.stop(self._handle)
        elif not self.seen().is_over:
            self._queue.cancel(self._handle)


def noted(folder: Path) -> Seen:
    """How the newest start of the run in `folder` ended, as it noted itself."""
    edges = [event for event in read_events(folder) if event["event"] in ("start", "end")]
    outcome = str(edges[-1].get("outcome")) if edges and edges[-1]["event"] == "end" else ""
    return Seen({"finished": "COMPLETED", "failed": "FAILED"}.get(outcome, "CANCELLED"))


def words_for(seen: Seen) -> str:
    """What Slurm did to a job, for people; empty: nothing."""
    return _WORDS.get(seen.state, "")


def reason(log: Path) -> str:
    """The line of the newest start in a job's log that says why it failed, or the last one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.rpartition(f"\n{_BEGUN}")[2].splitlines() if line.strip()]
    telling = ("ConfigError:", "TrainingError:", "launch:")
    return next((line for line in lines if line.startswith(telling)), "".join(lines[-1:]))
