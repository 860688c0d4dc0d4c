"""What launchers share that show a job's log on this terminal while it runs somewhere else."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from trainer.metrics.screen import Screen
from trainer.metrics.text import printable
from trainer.secrets import hidden

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
