"""Following a job from this terminal: what SageMaker does with it, its log, its steps, and its end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from strategies.errors import ConfigError
from trainer.launch.base import State
from trainer.launch.following import LogLines, asked
from trainer.launch.sagemaker_job import console_link, first_line, status_of
from trainer.metrics.display import is_terminal
from trainer.metrics.live import LiveScreen
from trainer.metrics.screen import PlainScreen, Screen
from trainer.metrics.text import duration, printable
from trainer.secrets import hidden
from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

if TYPE_CHECKING:
    from trainer.launch.sagemaker_job import Services

EVERY_S = 5.0
_PATIENCE_S = 600.0


def follow(
    request: Mapping[str, Any],
    services: Services,
    stream: TextIO,
    *,
    every_s: float | None = None,
    ask: Callable[[str], bool] | None = None,
) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        request: that it was created with.
        services: where it is.
        stream: where to show it.
        every_s: seconds between two looks; None: `EVERY_S`.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: 0 completed, 75 stopped, 2 wrong input, 1 failed, 130 left alone after a Ctrl-C.
    """
    name, every_s = str(request["TrainingJobName"]), EVERY_S if every_s is None else every_s
    screen: Screen = LiveScreen(stream) if is_terminal(stream) else PlainScreen(stream)
    watch = Watch(name, services, screen)
    screen.print(f"job {name}\n{console_link(name, services.region)}")
    screen.print(f"checkpoints: {request['CheckpointConfig']['S3Uri']}")
    while True:
        try:
            screen.open()
            while not watch.look_patiently():
                time.sleep(every_s)
            time.sleep(every_s)  # the last lines of a log come after the end, and they say why
            watch.look_patiently()
            screen.close()
            return watch.end()
        except KeyboardInterrupt:
            screen.close()
            question = f"Stop the job {name}? [y/N] "
            if (ask or asked)(question):
                services.stop(name)
                screen.print("stopping: the processes have two minutes for a checkpoint")
            else:
                command = f"aws sagemaker stop-training-job --region {services.region} --training-job-name {name}"
                screen.print(f"the job goes on; to stop it: {command}")
                return 130


class Watch:
    """What was seen of a job so far."""

    def __init__(self, name: str, services: Services, screen: Screen) -> None:
        self._name, self._services, self._screen = name, services, screen
        self._tokens: dict[str, str | None] = {}
        self._seen: set[tuple[str, str]] = set()
        self._lines = LogLines(screen)
        self._found: dict[str, Any] = {}
        self._lost: float | None = None

    def look_patiently(self) -> bool:
        """The same, but for a while it doesn't matter if AWS can't be reached; the job goes on without this terminal.

        Raises:
            ConfigError: it couldn't be reached for long.
        """
        try:
            over = self.look()
        except ConfigError as error:
            now = time.monotonic()
            if self._lost is None:
                self._lost = now
                self._screen.print(f"{error} The job goes on; asking again for {duration(_PATIENCE_S)}.")
            if now - self._lost > _PATIENCE_S:
                raise
            return False
        self._lost = None
        return over

    def look(self) -> bool:
        """Show what is new; True: the job is over, and its log was read to the end."""
        self._found = self._services.describe(self._name)
        over = status_of(self._found).state.over
        self._show_transitions()
        self._show_log(to_the_end=over)
        return over

    def end(self) -> int:
        """Say how it ended; the exit code."""
        status, found = status_of(self._found), self._found
        second = str(found.get("SecondaryStatus", ""))
        parts = [second if second != status.state.name.capitalize() else ""]
        if (trained := found.get("TrainingTimeInSeconds")) is not None:
            parts.append(f"training {duration(trained)}")
        if (billed := found.get("BillableTimeInSeconds")) is not None:
            count = found.get("ResourceConfig", {}).get("InstanceCount", 1)
            saved = f", {1 - billed / trained:.0%} saved by spot" if trained and billed < trained else ""
            parts.append(f"billed {billed} s for each of {count} hosts{saved}")
        if pool := found.get("WarmPoolStatus"):
            parts.append(f"warm pool: {pool.get('Status', '')}")
        said = "; ".join(part for part in parts if part)
        self._screen.print(f"{status.state.name}{f': {said}' if said else ''}")
        if status.state is State.finished:
            self._screen.print(f"model: {found.get('ModelArtifacts', {}).get('S3ModelArtifacts', '')}")
            return 0
        if status.state is State.stopped:
            self._screen.print("the same command goes on from its checkpoints")
            return EXIT_STOPPED
        reason = str(found.get("FailureReason", ""))
        self._screen.print(hidden(printable(first_line(reason))))
        if re.search(rf"exit code:? {EXIT_STOPPED}\b", reason):
            return EXIT_STOPPED
        return EXIT_WRONG_INPUT if "ConfigError:" in reason else 1

    def _show_transitions(self) -> None:
        for each in self._found.get("SecondaryStatusTransitions", []):
            seen = (str(each["Status"]), str(each.get("StatusMessage", "")))
            if seen not in self._seen:
                self._seen.add(seen)
                self._screen.print(": ".join(part for part in seen if part))

    def _show_log(self, *, to_the_end: bool) -> None:
        for stream in self._services.log_streams(self._name):
            self._tokens.setdefault(stream, None)
        for stream in self._tokens:
            before = None
            while True:
                lines, token = self._services.log_lines(stream, self._tokens[stream])
                self._tokens[stream] = token
                host = re.sub(r"-\d+$", "", stream.rpartition("/")[2])
                for line in lines:
                    self._lines.show(line, "" if host == "algo-1" else host)
                # The end of a log is where the same token comes again.
                if token in (None, before) or not (lines or to_the_end):
                    break
                before = token
