"""Leaving in good order: signals and time limits raise a flag; the loop asks all ranks at the next step."""

from __future__ import annotations

import os
import re
import signal
import time
from types import FrameType
from typing import Any

from strategies.errors import ConfigError

EXIT_STOPPED = 75
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_SAME_STOP_S = 2.0


class StopRequest:
    """Whether this rank was asked to stop; nothing is sent to other ranks from a signal handler.

    A launcher passes a Ctrl-C on to workers that the terminal has already told, so signals within two
    seconds count as one. A later one leaves at once.

    Args:
        max_time_s: seconds from now after which `out_of_time` holds; None: never.
        announce: tell the person at the terminal that a signal was heard.
    """

    def __init__(self, max_time_s: float | None, *, announce: bool = False, grace_s: float | None = None) -> None:
        self.signal = 0
        """Number of the signal that was heard; 0: none."""
        self.grace_s = 30.0 if grace_s is None else grace_s
        """Seconds between a signal and the kill."""
        self.reserve_s = 0.0
        """Seconds that one more step and a checkpoint take, as far as is known."""
        self._asked_at = 0.0
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._announce = announce
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals; only the main thread may."""
        try:
            self._before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        except ValueError:  # not the main thread, as in a notebook's worker: signals stay with their owner
            self._before = {}

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def out_of_time(self) -> bool:
        """The time limit of this start leaves no time for more than the last checkpoint."""
        return self._deadline is not None and time.monotonic() + self.reserve_s >= self._deadline

    def _heard(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and now - self._asked_at > _SAME_STOP_S:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._asked_at = number, now
            if self._announce:  # past Python's buffers, in which the signal may have come
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping at the next step, with a checkpoint; again: at once\n".encode())


def seconds(value: int | float | str | None, key: str) -> float | None:
    """A duration in seconds from a number, `MM:SS`, `HH:MM:SS`, or `90s`, `30m`, `2h`, `1d`.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    if value is None:
        return None
    text = str(value).strip()
    found: float | None = None
    units: dict[str, float] = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text):
        found = float(match.group(1)) * units[match.group(2)]
    elif match := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", text):
        hours, minutes, rest = (int(part or 0) for part in match.groups())
        found = 3600.0 * hours + 60 * minutes + rest
    if not found:
        raise ConfigError(f"Trainer: {key}={value!r} is not a duration. Write seconds, 30m, 2h or HH:MM:SS ({key}).")
    return found
