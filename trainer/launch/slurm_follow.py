"""Following a job of Slurm from this terminal: its states, its log, its steps, and its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from strategies.errors import ConfigError
from trainer.launch.base import State
from trainer.launch.following import LogLines, asked
from trainer.launch.slurm_job import SlurmJob, reason, words_for
from trainer.launch.slurm_queue import Seen
from trainer.metrics.display import is_terminal
from trainer.metrics.live import LiveScreen
from trainer.metrics.screen import PlainScreen, Screen
from trainer.metrics.text import duration
from trainer.stop import EXIT_STOPPED

EVERY_S = 1.0
"""Between two looks at the log, which lies on a disk."""
_ASK_EVERY_S = 5.0
"""Between two questions to Slurm."""
_PATIENCE_S = 600.0
_LAST_LINES_S = 3.0
"""What a node has written may take this long to be seen here."""


def follow(
    job: SlurmJob,
    log: Path,
    stream: TextIO,
    *,
    from_end: bool = False,
    every_s: float | None = None,
    ask: Callable[[str], bool] | None = None,
) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        job: that was submitted.
        log: Slurm's of the job.
        stream: where to show it.
        from_end: leave out what the log holds already.
        every_s: seconds between two looks; None: `EVERY_S`.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: 0 finished, 75 stopped, 2 wrong input, another one: failed, 130 left alone after a Ctrl-C.
    """
    every_s, handle = EVERY_S if every_s is None else every_s, job.handle
    screen: Screen = LiveScreen(stream) if is_terminal(stream) else PlainScreen(stream)
    watch = Watch(job, log, screen, from_end=from_end)
    screen.print(f"job {handle}, log {log}")
    told = False
    while True:
        try:
            screen.open()
            while not watch.look():
                time.sleep(every_s)
            watch.wait_for_last_lines(every_s)
            screen.close()
            return watch.end()
        except KeyboardInterrupt:
            screen.close()
            question = f"End the job {handle} at once? [y/N] " if told else f"Stop the job {handle}? [y/N] "
            if not (ask or asked)(question):
                screen.print(
                    f"the job goes on. The same command follows it again; to stop it with a checkpoint: "
                    f"scancel --signal=TERM {handle}"
                )
                return 130
            job.stop()
            screen.print("ending it" if told else "stopping, with a checkpoint")
            told = True


class Watch:
    """What was seen of a job so far."""

    def __init__(self, job: SlurmJob, log: Path, screen: Screen, *, from_end: bool = False) -> None:
        self._job, self._log, self._screen = job, log, screen
        self._lines = LogLines(screen)
        self._at = log.stat().st_size if from_end and log.exists() else 0
        self._torn = b""
        self._seen: Seen | None = None
        self._asked_at: float | None = None
        self._lost: float | None = None

    def look(self) -> bool:
        """Show what is new; True: the job is over.

        Raises:
            ConfigError: Slurm couldn't be asked for long. The job goes on without this terminal.
        """
        over = self._look_at_state()
        self.show_log()
        return over

    def _look_at_state(self) -> bool:
        now = time.monotonic()
        if self._asked_at is not None and now - self._asked_at < _ASK_EVERY_S:
            return False
        self._asked_at = now
        try:
            seen = self._job.seen(patience_s=0.0)
        except ConfigError as error:
            if self._lost is None:
                self._lost = now
                self._screen.print(f"{error} The job goes on; asking again for {duration(_PATIENCE_S)}.")
            if now - self._lost > _PATIENCE_S:
                raise
            return False
        self._lost = None
        before, self._seen = self._seen, seen
        if seen.is_over:
            return True
        told = None if before is None else (before.as_state(), before.restarts, before.detail)
        if told != (seen.as_state(), seen.restarts, seen.detail):
            self._say_state(seen)
        return False

    def _say_state(self, seen: Seen) -> None:
        again = f", started again {seen.restarts} times" if seen.restarts else ""
        where = f": {seen.detail}" if seen.detail else ""
        self._screen.print(f"{seen.as_state().value}{where}{again}")

    def show_log(self) -> int:
        """The lines that have come; how many bytes."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return 0
        self._at += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        for line in lines:
            self._lines.show(line.decode(errors="replace"))
        return len(data)

    def wait_for_last_lines(self, every_s: float) -> None:
        """They come after the end, and say why."""
        end = time.monotonic() + min(_LAST_LINES_S, 3 * every_s)
        while time.monotonic() < end:
            time.sleep(every_s)
            self.show_log()
        if self._torn:
            self._lines.show(self._torn.decode(errors="replace"))

    def end(self) -> int:
        """Say how it ended; the exit code."""
        assert self._seen is not None
        state, what = self._seen.as_state(), words_for(self._seen)
        self._screen.print(f"{state.value}{f': {what}' if what else ''}")
        if state is State.finished:
            return 0
        if state is State.stopped:
            self._screen.print("the same command goes on from its checkpoints")
            return EXIT_STOPPED
        if not what and (line := reason(self._log)):
            self._screen.print(line)
        return self._seen.exit_code or 1
