"""Leaving in good order: signals and time limits raise a flag; the loop asks all ranks at the next step."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

EXIT_WRONG_INPUT = 2
EXIT_STOPPED = 75
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_SAME_STOP_S = 2.0
# By launcher; `Launch` would have to be imported first.
_RANKS = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


_hearing: list[SignalEars] = []


class SignalEars:
    """Hears signals also while the main thread waits in a library for other ranks, when no Python handler can run.

    Args:
        noted: called in the main thread, as soon as that runs Python again.
        heard: called at once, in a thread of its own.
    """

    def __init__(self, noted: Callable[[int], None], heard: Callable[[int], None]) -> None:
        self._noted, self._heard = noted, heard
        self._before: dict[int, Any] = {}
        self._ends: tuple[int, int] | None = None

    def listen(self, signals: Sequence[int]) -> None:
        """Take over the signals; only the main thread may, elsewhere they stay with their owner."""
        try:
            self._before = {number: signal.signal(number, self._handle) for number in signals}
        except ValueError:
            return
        _hearing.append(self)
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._ends[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        """Give the signals back; may be called twice."""
        self._give_back()
        if self._ends is not None:
            _hearing.remove(self)
            signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
            os.close(self._ends[1])  # the thread reads the end, and closes its own
            self._ends = None

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @staticmethod
    def forget() -> None:
        """In a forked process: the pipe leads to its parent, which would take the child's signals for its own."""
        if _hearing:
            signal.set_wakeup_fd(-1)
        while _hearing:
            _hearing.pop()._give_back()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._noted(number)

    def _listen(self, end: int) -> None:
        while data := os.read(end, 64):
            for number in data:
                self._heard(number)
        os.close(end)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SignalEars.forget)


@contextlib.contextmanager
def leaving_at_once(launcher: int) -> Iterator[None]:
    """Until the loop listens there is nothing to save: a signal ends the process, wherever it waits.

    After the loop the process is on its way out, and only a second signal hurries it.

    Args:
        launcher: process number of whatever started this rank; if it is gone, that counts as a signal.
    """
    global _loop_listened
    _loop_listened, first = False, 0.0

    def leave(number: int) -> None:
        nonlocal first
        if number not in _SIGNALS:
            return
        if not _loop_listened:
            if all(os.environ.get(name, "0") == "0" for name in _RANKS):
                _tell(f"{signal.Signals(number).name}: nothing to save yet; the same command begins again")
            os._exit(EXIT_STOPPED)
        first = first or time.monotonic()
        if time.monotonic() - first > _SAME_STOP_S:
            os._exit(128 + number)

    ears, over = SignalEars(lambda number: None, leave), threading.Event()
    ears.listen(_SIGNALS)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # without a launcher the parent is a shell, which may well be closed
        threading.Thread(target=_follow, args=(launcher, over), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        ears.close()


_loop_listened = False


def _follow(launcher: int, over: threading.Event) -> None:
    """Where the launcher is gone, nobody else tells this process to end: it may wait for the launcher's store."""
    while not over.wait(1.0):
        if os.getppid() != launcher:
            if os.environ["RANK"] == "0":
                _tell("the launcher is gone")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _tell(text: str) -> None:
    """On stderr past Python's buffers, in which a signal may have come."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def default_grace_s() -> float:
    """Seconds between a signal and the kill: what the launcher says, or is known to give."""
    told = os.environ.get("SHARDWRIGHT_GRACE_S")
    if told is not None:
        return seconds(told, "SHARDWRIGHT_GRACE_S") or 0.0
    if "HOROVOD_GLOO_RENDEZVOUS_PORT" in os.environ:  # under horovodrun
        return 5.0
    on_sagemaker = any(name in os.environ for name in ("SM_TRAINING_ENV", "TRAINING_JOB_NAME"))
    return 120.0 if on_sagemaker else 30.0


class StopRequest:
    """Whether this rank was asked to stop; nothing is sent to other ranks from a signal handler.

    A launcher passes a Ctrl-C on to workers that the terminal has already told, so signals within two
    seconds count as one. A later one leaves at once.

    Args:
        max_time_s: seconds from now after which `out_of_time` holds; None: never.
        announce: tell the person at the terminal that a signal was heard.
        grace_s: seconds between a signal and the kill; None: `default_grace_s()`.
    """

    def __init__(self, max_time_s: float | None, *, announce: bool = False, grace_s: float | None = None) -> None:
        self.signal = 0
        """Number of the signal that was heard; 0: none."""
        self.grace_s = default_grace_s() if grace_s is None else grace_s
        """Seconds between a signal and the kill."""
        self.reserve_s = 0.0
        """Seconds that one more step and a checkpoint take, as far as is known."""
        self._asked_at = 0.0
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._announce = announce
        self._lock = threading.RLock()
        self._ears = SignalEars(self._note, self._heard)

    def listen(self) -> None:
        """Take over the signals; only the main thread may."""
        global _loop_listened
        _loop_listened = True
        self._ears.listen(_SIGNALS)

    def close(self) -> None:
        """Give the signals back."""
        self._ears.close()

    def out_of_time(self) -> bool:
        """The time limit of this start leaves no time for more than the last checkpoint."""
        return self._deadline is not None and time.monotonic() + self.reserve_s >= self._deadline

    def _note(self, number: int) -> None:
        with self._lock:
            if self.signal:
                return
            self.signal, self._asked_at = number, time.monotonic()
        if self._announce:
            _tell(f"{signal.Signals(number).name}: stopping at the next step, with a checkpoint; again: at once")

    def _heard(self, number: int) -> None:
        """Only here a signal counts as a second one: the main thread may note the first much later."""
        if number not in _SIGNALS:
            return
        if self.signal and time.monotonic() - self._asked_at > _SAME_STOP_S:
            os._exit(128 + number)
        self._note(number)


def seconds(value: int | float | str | None, key: str) -> float | None:
    """A duration in seconds from a number, `MM:SS`, `HH:MM:SS`, or `90s`, `30m`, `2h`, `1d`.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    from strategies.errors import ConfigError  # brings torch, which the handlers mustn't wait for

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
