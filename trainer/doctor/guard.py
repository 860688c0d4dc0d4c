"""Nobody waits for ever: a rank ends where a step takes too long or another rank falls silent, and says who it was."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from strategies.world import Launch
from trainer.doctor.findings import listed
from trainer.doctor.hosts import Layout
from trainer.sagemaker.failure import write_failure

_EVERY_S = 0.5
_MOST_ASKED = 256
"""Ranks that one looks at where something went wrong: were each to ask for all, it would be the square of them."""
_SILENT_S = 4.0
"""A rank that gives no sign of life for so long is gone, or stopped; asked where something went wrong."""
_STOPPED_S = 20.0
"""The same where nothing went wrong yet."""
_PATIENCE_S = 4.0
"""For the other thread to come back from the store."""
_LAST = 1_000_000
"""Number of the step after which a rank may be silent."""
_CUT_OFF = "the ranks' store does not answer: rank 0's host, the launcher there, or the link to it is gone"

Beat = list[Any]
"""A count, the number of the step, and its name."""


class Guard:
    """Watches over this rank's steps, and tells the others that it lives.

    One thread talks to the store and may hang in it, where the link is cut; the other one keeps the time.

    Args:
        launch: of this rank.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._store: Any = None
        self._prefix = ""
        self._layout: Layout | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        """Held while the store is asked."""
        self._step, self._number, self._beats = "starting", 0, 0
        self._begun, self._limit_s = time.monotonic(), float("inf")
        self._heard_s = self._looked_s = time.monotonic()
        self._neighbour: tuple[Beat | None, float] = (None, self._looked_s)
        self._threads = [
            threading.Thread(target=work, name=f"doctor-{work.__name__}", daemon=True)
            for work in (self._keep_time, self._talk)
        ]

    def __enter__(self) -> Guard:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._step, self._number = "leaving", _LAST
        self._closed.set()
        self._beat()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def attach(self, store: dist.Store, prefix: str) -> None:
        """From now on there is something through which ranks hear of each other.

        Args:
            store: the launch's.
            prefix: of the keys of this examination.
        """
        if self._launch.size > 1:
            self._prefix, now = prefix, time.monotonic()
            self._heard_s = self._looked_s = now
            self._neighbour = None, now
            self._store = store.clone()  # type: ignore[attr-defined]  # its stubs lack it
            self._beat()

    def learn(self, layout: Layout) -> None:
        """The names of the hosts."""
        self._layout = layout

    @contextlib.contextmanager
    def step(self, name: str, limit_s: float) -> Iterator[None]:
        """Around what may take `limit_s` seconds at most; all ranks have the same steps in the same order."""
        self._step, self._number = name, self._number + 1
        self._begun, self._limit_s = time.monotonic(), limit_s
        try:
            yield
        finally:
            self._limit_s = float("inf")

    @property
    def at(self) -> str:
        """The step that this rank is in, or has been in last."""
        return self._step

    def absent(self) -> str | None:
        """Who is missing, in words; takes a moment. None: nobody, as far as can be seen."""
        if self._store is None:
            return None
        before = self._others()
        time.sleep(_SILENT_S)
        after = self._others()
        if before is None or after is None:
            return _CUT_OFF
        silent = [rank for rank, beat in after.items() if beat is None or (before[rank] or [0])[0] == beat[0]]
        silent = sorted(rank for rank in silent if (after[rank] or [0, 0])[1] < _LAST)
        if silent:
            return self._silent(silent, after[silent[0]])
        late = {rank: beat[2] for rank, beat in after.items() if beat is not None and beat[1] < self._number}
        return f"{self._named([*late])} did not come as far, still {next(iter(late.values()))}" if late else None

    def lost(self) -> str | None:
        """The same, after an error; doesn't return where nothing can be said to the others, who would be waited for."""
        who = self.absent()
        if who == _CUT_OFF:
            self._end(f"while {self._step}: {who}")
        return who

    def _silent(self, ranks: list[int], seen: Beat | None) -> str:
        last = "" if seen is None else f", last seen {seen[2]}"
        return f"{self._named(ranks)} gave no sign of life{last}"

    def _named(self, ranks: list[int]) -> str:
        return listed([f"rank {rank}" if self._layout is None else self._layout.name_of(rank) for rank in ranks])

    # Through the store.

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Raises OSError where the other thread hangs in it."""
        if not self._lock.acquire(timeout=_PATIENCE_S):
            raise TimeoutError
        try:
            yield
        finally:
            self._lock.release()

    def _get(self, rank: int) -> Beat | None:
        key = f"{self._prefix}/beat/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _others(self) -> dict[int, Beat | None] | None:
        """Of the ranks that follow this one; None: the store doesn't answer."""
        mine, size = self._launch.rank, self._launch.size
        try:
            with self._asking():
                following = [(mine + each) % size for each in range(1, min(size, _MOST_ASKED))]
                return {rank: self._get(rank) for rank in following}
        except (RuntimeError, OSError):
            return None

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            if self._store is not None:
                with self._asking():
                    self._beats += 1
                    beat = [self._beats, self._number, self._step]
                    self._store.set(f"{self._prefix}/beat/{self._launch.rank}", json.dumps(beat))

    # In the thread that talks to it.

    def _talk(self) -> None:
        while not self._closed.wait(_EVERY_S):
            if self._store is None:
                continue
            self._beat()
            with contextlib.suppress(RuntimeError, OSError):
                with self._asking():
                    beat = self._get((self._launch.rank + 1) % self._launch.size)
                self._heard_s = now = time.monotonic()
                known = self._neighbour[0]
                if beat is None or beat != known or beat[1] == _LAST or now - self._looked_s > _STOPPED_S / 4:
                    self._neighbour = beat, now  # also where this rank itself was asleep
                self._looked_s = now

    # In the thread that keeps the time.

    def _keep_time(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_EVERY_S):
            now = time.monotonic()
            if now - last > _STOPPED_S / 4:  # asleep, and so was the other thread
                self._begun, self._heard_s = self._begun + now - last, now
            last = now
            if now - self._begun > self._limit_s:
                who = self.absent() or self._alone()
                self._end(f"{self._step} took more than {self._limit_s:.0f} s: {who}")
            elif self._store is not None and now - self._heard_s > _STOPPED_S:
                self._end(f"while {self._step}: {_CUT_OFF}")
            elif self._store is not None and self._looked_s - self._neighbour[1] > _STOPPED_S:
                following = (self._launch.rank + 1) % self._launch.size
                self._end(f"while {self._step}: {self._silent([following], self._neighbour[0])}")

    def _alone(self) -> str:
        if self._store is None and self._launch.size > 1:
            at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            if self._launch.rank == 0:
                return f"not all {self._launch.size} ranks came to {at}; see whether each was started, and the port"
            return f"nobody answers at {at}; see whether rank 0 was started there, and whether the port is open"
        return "nobody is missing; look at what this host is doing"

    def _end(self, why: str) -> None:
        if self._closed.is_set():  # it has come to an end meanwhile
            return
        line = f"TrainingError: doctor: {why}."
        write_failure(line)
        if self._first_to_say(line):
            os.write(2, f"{line}\n".encode())
        sys.stdout.flush()
        os._exit(1)

    def _first_to_say(self, line: str) -> bool:
        mine = f"{self._launch.rank}: {line}"
        with contextlib.suppress(RuntimeError, OSError):
            if self._store is not None:
                with self._asking():
                    first: bytes = self._store.compare_set("said", "", mine)
                return first.decode() in ("", mine)
        return True
