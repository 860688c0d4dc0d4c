"""Nobody waits for ever: a thread that ends this rank where a step takes too long, and says who was missing."""

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
_SILENT_S = 2.5
"""A rank that gives no sign of life for so long is gone, or stopped; asked where something went wrong."""
_STOPPED_S = 20.0
"""The same where nothing went wrong yet."""
_LAST = 1_000_000
"""Number of the step after which a rank may be silent."""


class Guard:
    """Watches over this rank's steps, and tells the others that it lives.

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
        self._step, self._number, self._beats = "starting", 0, 0
        self._begun, self._limit_s = time.monotonic(), float("inf")
        self._neighbour: tuple[list[Any] | None, float] = (None, 0.0)
        self._looked_s = 0.0
        self._thread = threading.Thread(target=self._watch, name="doctor", daemon=True)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._step, self._number = "leaving", _LAST
        self._beat()
        self._closed.set()
        self._thread.join(2 * _SILENT_S)
        self._store = None

    def attach(self, store: dist.Store, prefix: str) -> None:
        """From now on there is something through which ranks hear of each other.

        Args:
            store: the launch's.
            prefix: of the keys of this examination.
        """
        if self._launch.size > 1:
            with self._lock:
                self._store = store.clone()  # type: ignore[attr-defined]  # its stubs lack it
            self._prefix = prefix
            self._beat()

    def learn(self, layout: Layout) -> None:
        """The names of the hosts."""
        self._layout = layout

    @contextlib.contextmanager
    def step(self, name: str, limit_s: float) -> Iterator[None]:
        """Around what may take `limit_s` seconds at most; all ranks have the same steps in the same order."""
        self._step, self._number = name, self._number + 1
        self._begun, self._limit_s = time.monotonic(), limit_s
        self._beat()
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
        try:
            before = self._heard()
            time.sleep(_SILENT_S)
            after = self._heard()
        except (RuntimeError, OSError):
            return "the ranks' store is gone, and with it rank 0 or the launcher"
        silent = [rank for rank, beat in enumerate(after) if beat is None or (before[rank] or [0])[0] == beat[0]]
        silent = [rank for rank in silent if rank != self._launch.rank and (after[rank] or [0, 0])[1] < _LAST]
        if silent:
            return self._silent(silent, after[silent[0]])
        late = {rank: beat[2] for rank, beat in enumerate(after) if beat is not None and beat[1] < self._number}
        return f"{self._named([*late])} did not come as far, still {next(iter(late.values()))}" if late else None

    def _silent(self, ranks: list[int], seen: list[Any] | None) -> str:
        last = "" if seen is None else f", last seen {seen[2]}"
        return f"{self._named(ranks)} gave no sign of life{last}"

    def _named(self, ranks: list[int]) -> str:
        return listed([f"rank {rank}" if self._layout is None else self._layout.name_of(rank) for rank in ranks])

    def _heard(self) -> list[list[Any] | None]:
        """Count, number of the step and its name, of each rank; None: nothing yet."""
        with self._lock:
            keys = [f"{self._prefix}/beat/{rank}" for rank in range(self._launch.size)]
            return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    # In the thread.

    def _watch(self) -> None:
        while not self._closed.wait(_EVERY_S):
            self._beat()
            if time.monotonic() - self._begun > self._limit_s:
                who = self.absent() or self._alone()
                self._end(f"{self._step} took more than {self._limit_s:.0f} s: {who}")
            elif stopped := self._stopped():
                self._end(f"while {self._step}: {stopped}")

    def _stopped(self) -> str | None:
        """The next rank, if it is silent for long: each looks after one, so that all are looked after."""
        if self._store is None:
            return None
        following, now = (self._launch.rank + 1) % self._launch.size, time.monotonic()
        try:
            with self._lock:
                key = f"{self._prefix}/beat/{following}"
                beat = json.loads(self._store.get(key)) if self._store.check([key]) else None
        except (RuntimeError, OSError):  # the main thread hears of it, too
            return None
        if beat is None or beat != self._neighbour[0] or beat[1] == _LAST or now - self._looked_s > 5.0:
            self._neighbour = beat, now  # also where this rank itself was asleep
        self._looked_s = now
        return self._silent([following], beat) if now - self._neighbour[1] > _STOPPED_S else None

    def _beat(self) -> None:
        with self._lock, contextlib.suppress(RuntimeError, OSError):
            if self._store is not None:
                self._beats += 1
                self._store.set(
                    f"{self._prefix}/beat/{self._launch.rank}", json.dumps([self._beats, self._number, self._step])
                )

    def _end(self, why: str) -> None:
        line = f"TrainingError: doctor: {why}."
        write_failure(line)
        if self._first_to_say(line):
            os.write(2, f"{line}\n".encode())
        sys.stdout.flush()
        os._exit(1)

    def _alone(self) -> str:
        if self._store is None and self._launch.size > 1:
            at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            if self._launch.rank == 0:
                return f"not all {self._launch.size} ranks came to {at}; see whether each was started, and the port"
            return f"nobody answers at {at}; see whether rank 0 was started there, and whether the port is open"
        return "nobody is missing; look at what this host is doing"

    def _first_to_say(self, line: str) -> bool:
        mine = f"{self._launch.rank}: {line}"
        with self._lock, contextlib.suppress(RuntimeError, OSError):
            if self._store is not None:
                first: bytes = self._store.compare_set("said", "", mine)
                return first.decode() in ("", mine)
        return True
