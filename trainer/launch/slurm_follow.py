"""Following a job of Slurm from this terminal: its states, its log, its steps, and its end."""

from __future__ import annotations

import time
from pathlib import Path

from trainer.launch.base import State
from trainer.launch.following import AbstractWatch
from trainer.launch.slurm_job import SlurmJob, reason, words_for
from trainer.launch.slurm_queue import Seen
from trainer.metrics.screen import Screen
from trainer.stop import EXIT_STOPPED

EVERY_S = 1.0
"""Between two looks at the log, which lies on a disk; Slurm itself is asked less often."""


class SlurmWatch(AbstractWatch):
    """A job and its log."""

    def __init__(self, job: SlurmJob, log: Path, screen: Screen, *, from_end: bool = False) -> None:
        """Nothing is asked yet.

        Args:
            job: that was submitted.
            log: Slurm's of it.
            screen: where to show it.
            from_end: leave out what the log holds already.
        """
        super().__init__(job.handle, screen)
        self._job, self._log = job, log
        self._at = log.stat().st_size if from_end and log.exists() else 0
        self._torn = b""
        self._seen: Seen | None = None
        self._told = False
        screen.print(f"job {job.handle}, log {log}")

    @property
    def stop_command(self) -> str:
        return f"scancel --signal=TERM {self.name} (with a checkpoint); to see more of it: the same command again"

    def look(self) -> bool:
        seen = self._job.seen(patience_s=0.0)
        self._show_log()
        before, self._seen = self._seen, seen
        if seen.is_over:
            return True
        told = None if before is None else (before.as_state(), before.restarts, before.detail)
        if told != (seen.as_state(), seen.restarts, seen.detail):
            again = f", started again {seen.restarts} times" if seen.restarts else ""
            where = f": {seen.detail}" if seen.detail else ""
            self.screen.print(f"{seen.as_state().value}{where}{again}")
        return False

    def pause(self, wait_s: float) -> None:
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, EVERY_S))
            self._show_log()

    def stop(self) -> str:
        self._job.stop()
        first, self._told = not self._told, True
        return "with a checkpoint" if first else "at once"

    def end(self) -> int:
        assert self._seen is not None
        if self._torn:
            self.lines.show(self._torn.decode(errors="replace"))
        state, what = self._seen.as_state(), words_for(self._seen)
        self.screen.print(f"{state.value}{f': {what}' if what else ''}")
        if state is State.finished:
            return 0
        if state is State.stopped:
            self.screen.print("the same command goes on from its checkpoints")
            return EXIT_STOPPED
        if not what and (line := reason(self._log)):
            self.screen.print(line)
        return self._seen.exit_code or 1

    def _show_log(self) -> None:
        """The lines that have come."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        self._at += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            self.lines.show(line.decode(errors="replace"))
