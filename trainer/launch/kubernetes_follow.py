"""Following a job from this terminal: what the cluster does with it, the first node's log, and its end."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TextIO

from trainer.launch.base import State, Status
from trainer.launch.following import AbstractWatch, follow_until_end, screen_for
from trainer.launch.kubernetes_job import PodsJob, container_of, exit_code_of, phase
from trainer.metrics.screen import Screen
from trainer.stop import EXIT_STOPPED

_PATIENCE_S = 60.0
"""How long the log of a container that has ended may take to come."""
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT[0-9:.]+Z) ?(.*)", re.DOTALL)


def follow(job: PodsJob, stream: TextIO, *, ask: Callable[[str], bool] | None = None) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        job: that was handed over.
        stream: where to show it.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: 0 finished, 75 stopped, 2 wrong input, 1 failed, 130 left alone after a Ctrl-C.
    """
    watch = Watch(job, screen_for(stream))
    watch.screen.print(f"job {job.name}")
    return follow_until_end(watch, ask)


class Watch(AbstractWatch):
    """What was seen of a job so far."""

    def __init__(self, job: PodsJob, screen: Screen) -> None:
        super().__init__(job.name, screen)
        self._job = job
        self._status = Status(state=State.waiting)
        self._said = ""
        self._tail: Tail | None = None
        self._newest = self._seen = ""
        self._code = 1

    @property
    def stop_command(self) -> str:
        return " ".join(["kubectl", *self._job.kubectl.words[1:], "delete", self._job.resource])

    def stop(self) -> str:
        self._job.stop()
        return "the processes have their time for a checkpoint"

    def look(self) -> bool:
        self._status = self._job.look()
        over = self._status.state.over
        said = _line(self._status)
        if said != self._said and not over:
            self.screen.print(said)
        self._said = said
        pods = self._job.pods() if over or self._tail is None else []
        if over:
            self._code = exit_code_of(pods)
        if self._tail is None and pods and phase(pods[0]) != "Pending":
            since = [f"--since-time={self._newest}"] if self._newest else []
            words = [f"--container={container_of(self._job.kind)}", "--timestamps", "--follow", *since]
            self._tail = Tail([*self._job.kubectl.words, "logs", pods[0]["metadata"]["name"], *words])
            self._seen = self._newest
        return over

    def pause(self, wait_s: float) -> None:
        """Lines of the first node as they come, for so long."""
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            if self._tail is None:
                time.sleep(left)
                return
            line = self._tail.next_line(left)
            if line is not None:
                self._show(line)
            elif self._tail.over:
                if self._status.state.over:
                    return
                self.close()

    def last_lines(self) -> None:
        if self._tail is not None:  # a log that was opened ends with its container
            self.pause(_PATIENCE_S)

    def end(self) -> int:
        self.screen.print(_line(self._status))
        if self._status.state is State.finished:
            return 0
        if self._status.state is State.stopped:
            self.screen.print("the same command goes on from its checkpoints")
            return EXIT_STOPPED
        return self._code

    def close(self) -> None:
        if self._tail is not None:
            self._tail.close()
            self._tail = None

    def _show(self, line: str) -> None:
        found = _STAMP.fullmatch(line)
        if found is None:
            self.lines.show(line)
        elif found[1] > self._seen:  # else it was shown before the log was opened again
            self._newest = found[1]
            self.lines.show(found[2])


def _line(status: Status) -> str:
    return f"{status.state.name}{f': {status.detail}' if status.detail else ''}"


class Tail:
    """What a program prints, line by line, while something else is waited for too."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace", start_new_session=True,  # a Ctrl-C is a question, and the log goes on meanwhile
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="log", daemon=True)
        self._reader.start()
        self.over = False
        """It printed its last line."""

    def next_line(self, wait_s: float) -> str | None:
        """None: there was none in this time, or there are no more."""
        with contextlib.suppress(queue.Empty):
            line = self._lines.get(timeout=wait_s)
            self.over = line is None
            return line
        return None

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)
