"""A job in which nothing moves any more: how long that may be, and the words with which it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import platform
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from strategies.world import World
from trainer.peers import host_of
from trainer.pulse import PULSE
from trainer.rollcall import Answer, RollCall, words
from trainer.standing import standing, write_standing

HUNG = "no progress for "
"""What the words begin with."""
_FIRST_TIMES = 4
"""So many times longer may last what is done once: model, compilation and all else before the first step, and what
comes after the last."""
_ASLEEP_S = 5.0
"""Where nobody has looked for so long, the process or its machine stood still, and that time doesn't count."""
_EARLY_S = 15.0
"""The others are asked so long before the time is up, so that it is known by then who is missing."""
_SILENT_S = 10.0
"""Without an answer from a rank for so long, or from the store, there is none."""
_STUCK_S = 15.0
"""An interpreter in which no thread of Python has run for so long past the time is ended by C."""


class Watchdog:
    """Of one rank. Counts seconds in which the process was awake and nothing was done; knows who is to blame.

    Args:
        world: the ranks.
        folder: the run's.
        timeout_s: seconds without progress of any rank; None: as long as it takes.
    """

    def __init__(self, world: World, folder: Path, timeout_s: float | None) -> None:
        self._world = world
        self._folder = folder
        self._timeout_s = timeout_s
        self._roll: RollCall | None = None
        self._log: BinaryIO | None = None
        self._armed_at: float | None = None
        self._arming = threading.Lock()

    def begin(self, main: int) -> None:
        """From now on time counts.

        Args:
            main: identifies the thread that trains.
        """
        self._main = main
        self._beats, self._since, self._seen_at = PULSE.beats, time.monotonic(), time.monotonic()
        if self._timeout_s is not None:
            with contextlib.suppress(OSError):
                self._log = (self._folder / "logs" / f"rank-{self._world.rank}.log").open("ab", buffering=0)
        self.stay_awake()

    def connect(self, store: Any, prefix: str) -> None:
        """There are other ranks, and each has put its machine under `prefix/<rank>`."""
        self._store, self._prefix = store, prefix
        if self._timeout_s is not None:
            silent_s = min(_SILENT_S, self._timeout_s / 3)
            self._roll = RollCall(store, prefix, self._world.rank, self._world.size, silent_s=silent_s)

    def end(self) -> None:
        """No more; may be called twice."""
        with self._arming:  # or the other thread might arm it once more, and nobody would be left to disarm it
            if self._armed_at is not None:
                faulthandler.cancel_dump_traceback_later()
                self._armed_at = None
            if self._log is not None:
                self._log.close()
                self._log = None

    @property
    def every_s(self) -> float:
        """How often to look."""
        return 1.0 if self._timeout_s is None else min(1.0, self._timeout_s / 8)

    def limit_s(self) -> float | None:
        """Seconds without progress that are allowed just now."""
        return None if self._timeout_s is None else self._timeout_s * (1 if PULSE.steady else _FIRST_TIMES)

    def idle_s(self) -> float:
        """Seconds since this rank did something."""
        now = time.monotonic()
        if now - self._seen_at > _ASLEEP_S:
            self._since = min(now, self._since + now - self._seen_at)
        self._seen_at = now
        if PULSE.beats != self._beats:
            self._beats, self._since = PULSE.beats, now
        return now - self._since

    def stay_awake(self) -> None:
        """Where nobody comes to call this any more, since a library holds the interpreter, C ends the process."""
        limit, now = self.limit_s(), time.monotonic()
        with self._arming:
            if limit is None or self._log is None:
                return
            if self._armed_at is None or now - self._armed_at > limit / 20:
                self._armed_at = now
                faulthandler.dump_traceback_later(limit + _STUCK_S, exit=True, file=self._log)

    def ask_around(self, stopped: list[int]) -> str | None:
        """Answer who asks; ask, where this rank stands still; what to say if no rank moves. Uses the store.

        Args:
            stopped: ranks of this machine that SIGSTOP holds.
        """
        roll, limit, idle = self._roll, self.limit_s(), self.idle_s()
        if roll is None or limit is None:
            return None
        is_near = idle >= max(limit / 2, limit - _EARLY_S)
        if is_near or roll.is_on():
            mine = {"host": platform.node(), "idle_s": idle, "stopped": stopped}
            roll.answer({**standing(self._main), **mine})
        if not is_near:
            roll.withdraw()
            return None
        answers = roll.hear() if roll.ask() else None
        if answers is None or idle < limit - self.every_s:
            return None
        lately = limit - self.every_s - min(3.0, limit / 4)
        if any(each is not None and (each["debugged"] or each["idle_s"] < lately) for each in answers.values()):
            return None
        return self._words(
            max(idle, limit), words(answers, {rank: self._host(rank, each) for rank, each in answers.items()})
        )

    def alone(self, stopped: list[int], store_silent_s: float) -> str | None:
        """The same where there is nobody to ask.

        Args:
            stopped: ranks of this machine that SIGSTOP holds.
            store_silent_s: seconds for which the store of the ranks hasn't answered.
        """
        limit, idle = self.limit_s(), self.idle_s()
        if limit is None or idle < limit - self.every_s or (self._world.size > 1 and store_silent_s < _SILENT_S):
            return None
        mine = standing(self._main)
        if mine["debugged"]:
            return None
        if self._world.size == 1:
            return self._words(max(idle, limit), words({0: mine}, {0: platform.node()}))
        who = f"rank {', '.join(map(str, stopped))} is stopped (SIGSTOP)" if stopped else "nobody knows who is missing"
        store = f"the store of the ranks hasn't answered for {store_silent_s:.0f} s (is the launcher stopped?)"
        return self._words(max(idle, limit), f"{who}, and {store}")

    def write(self) -> None:
        """Where this rank stands, into its log."""
        write_standing(self._folder, self._world.rank)

    def _host(self, rank: int, answer: Answer | None) -> str:
        if answer is not None:
            return str(answer["host"])
        return host_of(json.loads(self._store.get(f"{self._prefix}/{rank}"))[0])

    def _words(self, idle: float, who: str) -> str:
        return (
            f"{HUNG}{idle:.0f} s: {who}. The stacks of all threads are in {self._folder / 'logs'}; start again to go "
            "on from the newest checkpoint, or allow more time (trainer.hang_timeout)"
        )
