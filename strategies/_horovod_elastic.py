"""horovodrun's elastic mode: the state in memory, and the way back in when workers are lost or join.

A worker that has lost another one doesn't mend its connections: it starts its command again, in the same process as the
system counts, so that horovodrun takes it for the same worker. Only the memory that holds its commit comes through.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies import _horovod_rejoin
from strategies._horovod_memory import Memory, kinds_of
from strategies.elastic import Elastic
from strategies.errors import ConfigError
from strategies.world import World

_MEMORY = "SHARDWRIGHT_COMMIT"
_TRIES = "SHARDWRIGHT_REJOINED"
_MEET_S = 300
"""For ranks that start, unless HOROVOD_ELASTIC_TIMEOUT says otherwise: horovodrun ends none for want of another."""
_COMMIT_S = 60
_MOST_TRIES = 3
"""Times that a worker begins again without having come to its next commit."""


def in_elastic_mode() -> bool:
    """Whether horovodrun puts new workers in the places of those that are lost, and counts the ranks anew."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(
            f"Launch: environment variable {name}={text!r} is not a number of seconds. Unset it ({name})."
        )
    return int(text)


class HorovodElastic(Elastic):
    """Made before ranks meet; `met` tells it that they have, and who they are."""

    def __init__(self, commit_every: int) -> None:
        super().__init__(commit_every)
        self._environment = dict(os.environ)  # as horovodrun made it
        self._memory = Memory(int(os.environ[_MEMORY]) if _MEMORY in os.environ else None)
        self._tries = int(os.environ.get(_TRIES, "0"))
        self._lock = threading.Lock()
        self._commits = 0
        self._changed = False
        self._world: World | None = None
        wait_s = _number("HOROVOD_ELASTIC_TIMEOUT", _MEET_S)
        self._meeting = threading.Timer(wait_s, self._leave, [f"not all ranks came within {wait_s:.0f} s"])
        self._meeting.daemon = True
        self._meeting.start()

    def met(self, world: World) -> None:
        """All ranks are connected. Rank 0 is the one whom horovodrun tells of other hosts."""
        self._meeting.cancel()
        self._world = world
        if world.rank == 0:
            from horovod.common.elastic import notification_manager

            notification_manager.init()
            notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called by Horovod, in a thread of its own."""
        self._changed = True

    def changed(self) -> bool:
        return self._changed

    def commit(self, step: int, note: str, tensors: Mapping[str, Tensor]) -> None:
        with self._lock:
            for name, place in self._memory.places(kinds_of(tensors)).items():
                place.copy_(tensors[name].detach())
            self._memory.note([step, note])
        self._commits += 1
        if self._commits > 1:  # the first is of where it began
            self._tries = 0

    def committed(self) -> tuple[str, dict[str, Tensor]] | None:
        assert self._world is not None
        mine = self._memory.read()
        steps = self._world.gather(-1 if mine is None else mine[0][0])
        newest = max(steps)
        if newest < 0:
            return None
        source = steps.index(newest)
        known: Any = None if mine is None else [mine[0][1], kinds_of(mine[1])]
        note, kinds = self._world.broadcast(known, source)
        has_it = steps[self._world.rank] == newest
        places = mine[1] if mine is not None and has_it else self._memory.places(kinds)
        for place in places.values() if min(steps) < newest else ():
            if place.numel():
                dist.broadcast(place.view(-1).view(torch.uint8), source, group=self._world.checkpoint)
        if not has_it:
            self._memory.note([newest, note])
        return note, places

    def rejoin(self, why: str) -> None:
        if self._tries >= _MOST_TRIES:
            return
        rank = self._environment["HOROVOD_RANK"]
        self._lock.acquire(timeout=_COMMIT_S)  # not in the middle of a commit, unless that waits for a device in vain
        os.write(2, f"rank {rank} begins again: {' '.join(why.split())}\n".encode())
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the others must notice that their connections are gone
                os.set_inheritable(int(path.name), int(path.name) in (0, 1, 2, self._memory.number))
        os.execve(  # noqa: S606 - this process's own command
            sys.executable,
            [sys.executable, str(Path(_horovod_rejoin.__file__)), *sys.orig_argv[1:]],
            {**self._environment, _MEMORY: str(self._memory.number), _TRIES: str(self._tries + 1)},
        )

    def _leave(self, why: str) -> None:
        """The main thread waits for ranks that don't come."""
        self.rejoin(why)
        os.write(2, f"TrainingError: {why}\n".encode())
        os._exit(1)
