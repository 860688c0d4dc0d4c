"""Following a job from this terminal: what SageMaker does with it, its log, its steps, and its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from trainer.launch.base import State
from trainer.launch.following import AbstractWatch, follow_until_end, screen_for
from trainer.launch.sagemaker_job import console_link, first_line, status_of
from trainer.metrics.screen import Screen
from trainer.metrics.text import duration, printable
from trainer.secrets import hidden
from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

if TYPE_CHECKING:
    from trainer.launch.sagemaker_job import Services


def follow(
    request: Mapping[str, Any], services: Services, stream: TextIO, *, ask: Callable[[str], bool] | None = None
) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        request: that it was created with.
        services: where it is.
        stream: where to show it.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: 0 completed, 75 stopped, 2 wrong input, 1 failed, 130 left alone after a Ctrl-C.
    """
    name = str(request["TrainingJobName"])
    watch = Watch(name, services, screen_for(stream))
    watch.screen.print(f"job {name}\n{console_link(name, services.region)}")
    watch.screen.print(f"checkpoints: {request['CheckpointConfig']['S3Uri']}")
    return follow_until_end(watch, ask)


class Watch(AbstractWatch):
    """What was seen of a job so far."""

    def __init__(self, name: str, services: Services, screen: Screen) -> None:
        super().__init__(name, screen)
        self._services = services
        self._tokens: dict[str, str | None] = {}
        self._seen: set[tuple[str, str]] = set()
        self._found: dict[str, Any] = {}

    @property
    def stop_command(self) -> str:
        region = self._services.region
        return f"aws sagemaker stop-training-job --region {region} --training-job-name {self.name}"

    def stop(self) -> str:
        self._services.stop(self.name)
        return "the processes have two minutes for a checkpoint"

    def look(self) -> bool:
        self._found = self._services.describe(self.name)
        over = status_of(self._found).state.over
        self._show_transitions()
        self._show_log(to_the_end=over)
        return over

    def end(self) -> int:
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
        self.screen.print(f"{status.state.name}{f': {said}' if said else ''}")
        if status.state is State.finished:
            self.screen.print(f"model: {found.get('ModelArtifacts', {}).get('S3ModelArtifacts', '')}")
            return 0
        if status.state is State.stopped:
            self.screen.print("the same command goes on from its checkpoints")
            return EXIT_STOPPED
        reason = str(found.get("FailureReason", ""))
        self.screen.print(hidden(printable(first_line(reason))))
        if re.search(rf"exit code:? {EXIT_STOPPED}\b", reason):
            return EXIT_STOPPED
        return EXIT_WRONG_INPUT if "ConfigError:" in reason else 1

    def _show_transitions(self) -> None:
        for each in self._found.get("SecondaryStatusTransitions", []):
            seen = (str(each["Status"]), str(each.get("StatusMessage", "")))
            if seen not in self._seen:
                self._seen.add(seen)
                self.screen.print(": ".join(part for part in seen if part))

    def _show_log(self, *, to_the_end: bool) -> None:
        for stream in self._services.log_streams(self.name):
            self._tokens.setdefault(stream, None)
        for stream in self._tokens:
            before = None
            while True:
                lines, token = self._services.log_lines(stream, self._tokens[stream])
                self._tokens[stream] = token
                host = re.sub(r"-\d+$", "", stream.rpartition("/")[2])
                for line in lines:
                    self.lines.show(line, "" if host == "algo-1" else host)
                # The end of a log is where the same token comes again.
                if token in (None, before) or not (lines or to_the_end):
                    break
                before = token
