"""Who is still there: a thread per rank that looks after the others, so that none waits for a dead one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from strategies.world import World
from trainer.metrics.logs import LOGGER

_EVERY_S = 1.0
_BEAT_GONE_S = 20.0
"""Without a sign of life from another machine for this long, it is gone."""
_LEAVE_S = 4.0
"""A rank whose peer is gone gets this long to notice by itself, before it is ended wherever it waits."""
_CLOSING_S = 20.0
"""The same for one that has noticed, and is closing its files."""
_STOP_S = 600.0
"""The same where only the store is gone: time for a last checkpoint."""
_SURE_S = 30.0
"""How long rank 0 may be missing where the store can't tell any more whether it left in order."""


@dataclass(frozen=True)
class _Peer:
    machine: str
    process: psutil.Process | None
    """None: of another machine, or there was none any more."""

    @classmethod
    def met(cls, machine: str, pid: int) -> _Peer:
        with contextlib.suppress(psutil.NoSuchProcess):
            return cls(machine, psutil.Process(pid) if machine == _machine() else None)
        return cls(machine, None)

    def is_gone(self) -> bool:
        try:
            process = self.process
            return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # not to be seen is not dead
            return False


def _machine() -> str:
    """What ranks that can see each other's processes have in common; containers may share a host's name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


class Liveness:
    """Watches from entering to leaving the context; does nothing where a process is alone.

    Ranks of the same machine are looked at as processes; of each other machine, one rank's sign of life in the
    store. The store is used through a connection of its own, and never a collective, since the main thread may be
    waiting in either. A stopped or slow process isn't dead. When a rank is gone, the main threads of the others
    mostly hear of it from their communication library and ask `lost`; one that hangs is ended here.

    Args:
        world: the ranks.
        folder: the run's.
        number: of the run among those of the launch.
    """

    def __init__(self, world: World, folder: Path, number: int) -> None:
        self._world = world
        self._folder = folder
        self._prefix = f"live/{number}"
        self._failed = f"failed/{number}"
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._peers: dict[int, _Peer] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._count = 0
        self._looked_at = 0.0
        self._stopping = False
        self._store_gone_at: float | None = None
        self._verdict: str | None = None

    def __enter__(self) -> Liveness:
        if self._world.size == 1:
            return self
        self._store: Any = self._world.store.clone()  # type: ignore[attr-defined]  # its stubs lack it
        self._main = threading.get_ident()
        self._set(str(self._world.rank), json.dumps([_machine(), os.getpid()]))
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            if self._store_gone_at is None and not self._stopping:
                with contextlib.suppress(RuntimeError):
                    self._set(f"left/{self._world.rank}", "")
            self._closed.set()
            self._thread.join(_LEAVE_S)

    def lost(self, error: Exception) -> str | None:
        """Who is gone, if that is what `error` of this rank comes from; waits a moment to find out.

        None: nobody is, or another rank failed with an error of its own and says so itself.
        """
        if self._thread is None or not is_broken_connection(error):
            return None
        end = time.monotonic() + _LEAVE_S
        while time.monotonic() < end:
            with self._lock:
                self._look()
            if self._verdict is not None or self._failed_elsewhere():
                break
            time.sleep(0.1)
        return self._verdict

    # In the thread.

    def _watch(self) -> None:
        since: float | None = None
        while not self._closed.wait(_EVERY_S):
            with self._lock:
                self._look()
            if self._verdict is None and not self._failed_elsewhere():
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since >= self._patience_s() and not self._closed.is_set():
                self._end()

    def _patience_s(self) -> float:
        handled = sys._current_exceptions().get(self._main)
        return _LEAVE_S if handled in (None, (None, None, None)) else _CLOSING_S

    def _look(self) -> None:
        """Once over everything; the verdict is for good."""
        if self._verdict is not None:
            return
        now = time.monotonic()
        if now - self._looked_at > 5 * _EVERY_S:  # asleep meanwhile, and perhaps the others too
            self._beats.clear()
        self._looked_at = now
        if self._store_gone_at is not None:
            self._look_without_store()
            return
        try:
            self._beat()
            self._meet()
            if self._verdict is None:
                self._look_at_peers()
        except (RuntimeError, OSError):  # the store's connection broke: it was with rank 0, or with the launcher
            self._look_without_store()

    def _beat(self) -> None:
        """Tell the other machines that this one lives."""
        if self._world.local_rank == 0 and self._world.local_size < self._world.size:
            self._count += 1
            self._set(f"beat/{self._world.rank}", str(self._count))

    def _meet(self) -> None:
        """Learn of the ranks of this machine, and of one rank of the next machine."""
        world = self._world
        node = world.rank - world.local_rank
        for rank in {*range(node, min(node + world.local_size, world.size)), (node + world.local_size) % world.size}:
            if rank != world.rank and rank not in self._peers and self._store.check([f"{self._prefix}/{rank}"]):
                self._peers[rank] = _Peer.met(*json.loads(self._store.get(f"{self._prefix}/{rank}")))

    def _look_at_peers(self) -> None:
        for rank, peer in self._peers.items():
            gone = peer.is_gone() if peer.machine == _machine() else self._is_silent(rank)
            if gone and not self._store.check([f"{self._prefix}/left/{rank}"]):
                self._verdict = self._words(rank)
                return

    def _is_silent(self, rank: int) -> bool:
        """The first rank of another machine hasn't counted on for long."""
        key, now = f"{self._prefix}/beat/{rank}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        known, since = self._beats.get(rank, (None, now))
        if beat != known or not beat:  # not all send any
            self._beats[rank] = (beat, now)
            return False
        return now - since > _BEAT_GONE_S

    def _look_without_store(self) -> None:
        """Only the processes of this machine can be seen."""
        self._store_gone_at = self._store_gone_at or time.monotonic()
        missing_s = time.monotonic() - self._store_gone_at
        first = self._peers.get(0)
        hosted_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        is_gone = first is not None and first.machine == _machine() and first.is_gone()
        if self._world.elastic is not None:  # also where it only begins again
            self._verdict = "rank 0 is gone, and with it what the ranks share"
            return
        if is_gone and (hosted_it or missing_s > _SURE_S):
            self._verdict = self._words(0)
            return
        self._stop("the launcher's store is gone")
        if missing_s > _STOP_S:
            self._verdict = "the launcher or the machine of rank 0 is gone; start again to go on"

    def _stop(self, why: str) -> None:
        """Ask the loop to stop in order: the ranks' own connections may all be whole."""
        if not self._stopping:
            self._stopping = True
            LOGGER.error("%s: stopping with a checkpoint", why)
            if self._world.rank == 0:
                os.write(2, f"\n{why}\n".encode())
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self) -> None:
        """The main thread doesn't come out of its waiting: say why, from one rank, and leave."""
        line = f"TrainingError: {self._verdict or self._failed_elsewhere()}"
        LOGGER.error(line)
        if self._world.elastic is not None:
            self._world.elastic.rejoin("another rank is gone, and it waits in vain")
        mine, first = f"{self._world.rank}: {line}", ""
        with contextlib.suppress(RuntimeError, OSError):
            first = "" if self._store_gone_at else self._store.compare_set("said", "", mine).decode()
        if first in ("", mine):
            os.write(2, f"{line}\n".encode())
        sys.stdout.flush()
        os._exit(1)

    def _failed_elsewhere(self) -> str | None:
        """What another rank said when it failed."""
        with contextlib.suppress(RuntimeError, OSError):
            if self._store_gone_at is None and self._store.check([self._failed]):
                text: str = self._store.get(self._failed).decode()
                return None if text.startswith(f"rank {self._world.rank}:") else text
        return None

    def _words(self, rank: int) -> str:
        log = self._folder / "logs" / f"rank-{rank}.log"
        return (
            f"rank {rank} is gone without a word: killed, perhaps for want of memory (the kernel's log tells). "
            f"Its own log is {log}; start again to go on from the newest checkpoint"
        )

    def _set(self, key: str, value: str) -> None:
        self._store.set(f"{self._prefix}/{key}", value)


def is_broken_connection(error: Exception) -> bool:
    """Whether `error` is what a rank hears when another one is gone."""
    text = str(error).lower()
    words = ("gloo", "connection", "nccl", "broken pipe", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, (RuntimeError, OSError)) and any(word in text for word in words)
    )
