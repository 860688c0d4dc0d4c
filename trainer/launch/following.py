"""What launchers share that show a job's log on this terminal while it runs somewhere else."""

from __future__ import annotations

import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TextIO

from strategies.errors import ConfigError
from trainer.metrics.display import is_terminal
from trainer.metrics.live import LiveScreen
from trainer.metrics.screen import PlainScreen, Screen
from trainer.metrics.text import duration, printable
from trainer.secrets import hidden

EVERY_S = 5.0
"""Between two looks."""
PATIENCE_S = 600.0
"""How long there may be no answer."""

_STEP = re.compile(r"\bstep=(\d+)(?:/(\d+))? (\S+=.*)")
_PAIR = re.compile(r"(\w+)=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|-?inf|nan)(?=\s|$)")


class LogLines:
    """Lines of a job's log: those of steps move the bar, all others are shown as they are."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._total: int | None = None

    def show(self, line: str, who: str = "") -> None:
        """The next line.

        Args:
            line: as the job printed it.
            who: put before it, where several machines' lines come together.
        """
        text = hidden(printable(line.rstrip("\r\n")))
        step = _STEP.search(text)
        numbers = {} if step is None else _numbers(step[3])
        if step is None or not numbers:
            self._screen.print(f"[{who}] {text}" if who else text)
        elif any("val_" in key for key in numbers):
            self._screen.evaluated(text, numbers)
        else:
            if step[2] is not None and int(step[2]) != self._total:
                self._total = int(step[2])
                self._screen.begin(self._total, int(step[1]))
            self._screen.logged(text, int(step[1]), numbers, _seconds_left(step[3]))


def newest_numbers(lines: Iterable[str]) -> dict[str, float]:
    """`step`, `loss`, `val_loss` and the like, as the last lines of a log that have them say it."""
    found: dict[str, float] = {}
    for line in lines:
        if (step := _STEP.search(line)) is not None and (numbers := _numbers(step[3])):
            found |= {"step": float(step[1]), **numbers}
    return found


def asked(question: str) -> bool:
    """Yes or no, from the person at the terminal; without one nobody can answer, and the job is left alone."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(question)
    sys.stderr.flush()
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _numbers(text: str) -> dict[str, float]:
    return {key: float(value) for key, value in _PAIR.findall(text)}


def _seconds_left(text: str) -> float | None:
    found = re.search(r"\beta=(\d+):(\d\d):(\d\d)\b", text)
    return None if found is None else float(int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]))


class AbstractWatch(ABC):
    """One job as it is seen from here, while it runs somewhere else."""

    def __init__(self, name: str, screen: Screen) -> None:
        self.name = name
        self.screen = screen
        self.lines = LogLines(screen)
        self._lost: float | None = None

    @property
    @abstractmethod
    def stop_command(self) -> str:
        """With which a person stops the job without this program."""

    @abstractmethod
    def look(self) -> bool:
        """Show what is new; True: the job is over, and its log was read to the end.

        Raises:
            ConfigError: there is no answer now.
        """

    @abstractmethod
    def end(self) -> int:
        """Say how it ended; the exit code."""

    @abstractmethod
    def stop(self) -> str:
        """Ask the job to stop; what the person should know of it."""

    def pause(self, wait_s: float) -> None:
        """Until the next look."""
        time.sleep(wait_s)

    def last_lines(self) -> None:
        """Wait for the lines of a log that come after the job's end: they say why."""
        self.pause(EVERY_S)

    def close(self) -> None:
        """Let go of what is held; `look` may come again."""

    def look_patiently(self) -> bool:
        """`look`, but for a while it doesn't matter if nobody answers: the job goes on without this terminal.

        Raises:
            ConfigError: there was no answer for long.
        """
        try:
            over = self.look()
        except ConfigError as error:
            now = time.monotonic()
            if self._lost is None:
                self._lost = now
                self.screen.print(f"{error} The job goes on; asking again for {duration(PATIENCE_S)}.")
            if now - self._lost > PATIENCE_S:
                raise
            return False
        self._lost = None
        return over


def screen_for(stream: TextIO) -> Screen:
    """A live one for a terminal, plain lines for anything else."""
    return LiveScreen(stream) if is_terminal(stream) else PlainScreen(stream)


def follow_until_end(watch: AbstractWatch, ask: Callable[[str], bool] | None = None) -> int:
    """Show how a job goes until its end; a Ctrl-C asks whether to end it.

    Args:
        watch: of the job.
        ask: a question for y or n; None: on the terminal, if there is one.

    Returns:
        The exit code: `watch.end()`'s, or 130 where the job was left alone after a Ctrl-C.
    """
    screen = watch.screen
    while True:
        try:
            screen.open()
            while not watch.look_patiently():
                watch.pause(EVERY_S)
            watch.last_lines()
            watch.look_patiently()
            screen.close()
            return watch.end()
        except KeyboardInterrupt:
            screen.close()
            if (ask or asked)(f"Stop the job {watch.name}? [y/N] "):
                screen.print(f"stopping: {watch.stop()}")
            else:
                screen.print(f"the job goes on; to stop it: {watch.stop_command}")
                return 130
        finally:
            watch.close()
