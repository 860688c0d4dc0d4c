"""How the ranks talk: the backend's own rules, apart from what is said over it."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from strategies.errors import ConfigError
from strategies.world import Launch, World, agree, open_store

_LONGEST_S = 7 * 24 * 3600


@dataclass(kw_only=True)
class Backend(ABC):
    """A communication library and the kind of device that it serves."""

    timeout_s: float = 1800.0
    """Seconds after which a collective that doesn't finish is an error."""
    interface: str | None = None
    """Network interface to use, such as `eth0`; the library chooses when it is null."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= _LONGEST_S:
            raise ConfigError(
                f"Backend: timeout_s={self.timeout_s} is not between 0 and {_LONGEST_S}, a week. "
                "Give seconds, such as 1800 (backend.timeout_s)."
            )

    @abstractmethod
    def torch_name(self) -> str:
        """The name that torch.distributed knows."""

    @abstractmethod
    def device(self, launch: Launch) -> torch.device:
        """This rank's device.

        Raises:
            ConfigError: the machine lacks it.
        """


@dataclass(kw_only=True)
class GlooBackend(Backend):
    """Gloo on CPU."""

    def torch_name(self) -> str:
        return "gloo"

    def device(self, launch: Launch) -> torch.device:
        return torch.device("cpu")


@dataclass(kw_only=True)
class NCCLBackend(Backend):
    """NCCL, one GPU for each rank."""

    def torch_name(self) -> str:
        return "nccl"

    def device(self, launch: Launch) -> torch.device:
        seen = torch.cuda.device_count()
        if seen < launch.local_size:
            raise ConfigError(
                f"NCCLBackend: {launch.local_size} processes on this machine, but {seen} CUDA devices. "
                f"Start at most {seen} per machine, or use backend=gloo (backend)."
            )
        return torch.device("cuda", launch.local_rank)


@dataclass(kw_only=True)
class AutoBackend(Backend):
    """NCCL where every rank of the machine has a GPU, else Gloo on CPU."""

    def torch_name(self) -> str:
        return "nccl" if torch.cuda.is_available() else "gloo"

    def device(self, launch: Launch) -> torch.device:
        chosen = NCCLBackend if torch.cuda.is_available() else GlooBackend
        return chosen(timeout_s=self.timeout_s, interface=self.interface).device(launch)


def connect_ranks(backend: Backend) -> World:
    """Start `backend` between the ranks of this launch, and the two CPU groups beside it.

    Every rank is heard before the first collective: a machine without the device that the others
    have makes all ranks refuse, with one message.

    Raises:
        ConfigError: some rank can't take part; the same message on every rank.
    """
    launch = Launch.from_env()
    store = open_store(launch)
    # Every rank connects equally often; a second time must not meet the keys of the first.
    connection = store.add(f"connections/{launch.rank}", 1)
    error: ConfigError | None = None
    device = torch.device("cpu")
    try:
        _check_interface(backend)
        device = backend.device(launch)
    except ConfigError as caught:
        error = caught
    agree(store, launch, f"connect/{connection}", error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if backend.interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = backend.interface
    elif _on_one_machine(launch) and (loopback := _loopback()):
        for library in ("GLOO", "NCCL"):  # nobody else needs to reach these ports
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    if launch.size == 1 and "MASTER_ADDR" not in os.environ:
        # An in-memory store has no address to rendezvous at: a file-less group of one.
        store = dist.HashStore()
    timeout = timedelta(seconds=backend.timeout_s)
    dist.init_process_group(
        backend.torch_name(),
        store=dist.PrefixStore(f"groups/{connection}", store),
        rank=launch.rank,
        world_size=launch.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return World(
        rank=launch.rank,
        local_rank=launch.local_rank,
        size=launch.size,
        local_size=launch.local_size,
        data_rank=launch.rank,
        data_size=launch.size,
        device=device,
        store=store,
        control=dist.new_group(backend="gloo", timeout=timeout),
        checkpoint=dist.new_group(backend="gloo", timeout=timeout),
    )


def _on_one_machine(launch: Launch) -> bool:
    """Some launchers don't say how many ranks a machine has."""
    return launch.size == 1 or ("LOCAL_WORLD_SIZE" in os.environ and launch.local_size == launch.size)


def _check_interface(backend: Backend) -> None:
    """Refuse an interface that this machine lacks; the control messages need plain names also beside NCCL."""
    import psutil

    internet = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs().items()
    known = sorted(name for name, places in found if any(place.family in internet for place in places))
    for name in [] if backend.interface is None else backend.interface.split(","):
        if name not in known:
            raise ConfigError(
                f"Backend: interface={backend.interface!r} is not a network interface of this machine that has an "
                f"address. It has {', '.join(known)} (backend.interface)."
            )


def _loopback() -> str | None:
    """The interface of 127.0.0.1, if it is up."""
    import psutil

    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == "127.0.0.1" for entry in addresses) and name in states and states[name].isup:
            return str(name)
    return None
