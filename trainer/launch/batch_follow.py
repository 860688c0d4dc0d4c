"""Following a job from this terminal: what AWS Batch does with it, its main node's log, and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from trainer.launch.base import State
from trainer.launch.batch_job import BatchJob, command_code, exit_code_of, log_of, status_of
from trainer.launch.following import AbstractWatch, follow_until_end, screen_for
from trainer.metrics.screen import Screen


def follow(job: BatchJob, stream: TextIO, *, ask: Callable[[str], bool] | None = None) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        job: that was submitted.
        stream: where to show it.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: 0 finished, 75 stopped, 2 wrong input, 1 failed, 130 left alone after a Ctrl-C.
    """
    watch = Watch(job, screen_for(stream))
    region = job.services.region
    page = f"https://{region}.console.aws.amazon.com/batch/home?region={region}#jobs/detail/{job.number}"
    watch.screen.print(f"job {job.number}\n{page}")
    return follow_until_end(watch, ask)


class Watch(AbstractWatch):
    """What was seen of a job so far."""

    def __init__(self, job: BatchJob, screen: Screen) -> None:
        super().__init__(job.number, screen)
        self._job = job
        self._tokens: dict[tuple[str, str], str | None] = {}
        self._whole: dict[str, Any] = {}
        self._main: dict[str, Any] = {}
        self._said = ""

    @property
    def stop_command(self) -> str:
        region = self._job.services.region
        return f"aws batch terminate-job --region {region} --job-id {self.name} --reason stop"

    def stop(self) -> str:
        self._job.services.stop(self.name)
        return "the processes have half a minute for a checkpoint"

    def look(self) -> bool:
        self._whole, self._main = self._job.look()
        status = status_of(self._whole, self._main)
        said = f"{str(self._whole['status']).lower()}{f': {status.detail}' if status.detail else ''}"
        if said != self._said and not status.state.over:
            self.screen.print(said)
        self._said = said
        if (place := log_of(self._main)) is not None:
            self._tokens.setdefault(place, None)
        for place in self._tokens:
            self._show_log(place, to_the_end=status.state.over)
        return status.state.over

    def end(self) -> int:
        status = status_of(self._whole, self._main)
        self.screen.print(f"{status.state.name}{f': {status.detail}' if status.detail else ''}")
        if status.state is State.stopped:
            self.screen.print("the same command goes on from its checkpoints")
        return command_code(status, exit_code_of(self._whole, self._main))

    def _show_log(self, place: tuple[str, str], *, to_the_end: bool) -> None:
        before = None
        while True:
            lines, token = self._job.services.log_lines(*place, self._tokens[place])
            self._tokens[place] = token
            for line in lines:
                self.lines.show(line)
            # The end of a log is where the same token comes again.
            if token in (None, before) or not (lines or to_the_end):
                return
            before = token
