"""Other ranks' processes, as far as this machine can see them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from strategies.world import World


@dataclass(frozen=True)
class Peer:
    """Another rank."""

    machine: str
    process: psutil.Process | None
    """None: of another machine, or there was none any more."""

    @classmethod
    def met(cls, machine: str, pid: int) -> Peer:
        """From what that rank says of itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return cls(machine, psutil.Process(pid) if machine == this_machine() else None)
        return cls(machine, None)

    @property
    def is_here(self) -> bool:
        """On this machine, so that its process can be looked at."""
        return self.machine == this_machine()

    def is_gone(self) -> bool:
        """Its process has ended; asked of ranks of this machine."""
        try:
            process = self.process
            return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # not to be seen is not dead
            return False

    def is_stopped(self) -> bool:
        """Somebody has sent it SIGSTOP."""
        with contextlib.suppress(psutil.Error):
            return self.process is not None and self.process.status() == psutil.STATUS_STOPPED
        return False

    def wake(self) -> None:
        """Let a stopped process go on: it ends by itself then, with its own stacks in its log."""
        with contextlib.suppress(psutil.Error):
            if self.process is not None:
                self.process.send_signal(signal.SIGCONT)


@functools.cache
def this_machine() -> str:
    """What ranks that can see each other's processes have in common; containers may share a host's name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def host_of(machine: str) -> str:
    """The name for people."""
    return machine.partition(" ")[0]


def store_is_elsewhere(world: World) -> bool:
    """Whether the ranks' store is kept by another machine than this one."""
    if world.local_size >= world.size:
        return False
    first_is_here = world.rank == world.local_rank
    if first_is_here and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # rank 0 keeps it itself
    host = os.environ.get("MASTER_ADDR")
    try:
        places = {entry[4][0] for entry in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        places = set()
    if not places:
        return not first_is_here
    return not any(entry.address in places for entries in psutil.net_if_addrs().values() for entry in entries)
