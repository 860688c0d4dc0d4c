"""How the ranks talk: the backend's own rules, apart from what is said over it."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from strategies.errors import ConfigError, TrainingError
from strategies.interfaces import Interfaces, choose, loopback
from strategies.meeting import MEETING, wait_for
from strategies.world import Launch, World, agree, exchange, open_store

_LONGEST_S = 7 * 24 * 3600


@dataclass(kw_only=True)
class Backend(ABC):
    """A communication library and the kind of device that it serves."""

    timeout_s: float = 1800.0
    """Seconds after which a collective that doesn't finish is an error."""
    interface: str | None = None
    """Network interface to use, such as `eth0`, `eth0,eth1` or `^docker,veth`; the library chooses when it is null."""
    meeting_s: float = 600.0
    """Seconds that the ranks wait at the start for those that aren't there yet."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= _LONGEST_S:
            raise ConfigError(
                f"Backend: timeout_s={self.timeout_s} is not between 0 and {_LONGEST_S}, a week. "
                "Give seconds, such as 1800 (backend.timeout_s)."
            )
        if not 0 < self.meeting_s <= _LONGEST_S:
            raise ConfigError(
                f"Backend: meeting_s={self.meeting_s} is not between 0 and {_LONGEST_S}, a week. "
                "Give seconds, such as 600 (backend.meeting_s)."
            )

    def meet(self) -> None:
        """Wait until every rank of this launch is there.

        Raises:
            ConfigError: one has said that the input is wrong.
            TrainingError: one has failed already, or doesn't come in time.
        """
        MEETING.limit_s = self.meeting_s
        launch = Launch.from_env()
        if launch.size == 1:
            return
        store = open_store(launch)
        occasion = f"meetings/{store.add(f'meetings/of/{launch.rank}', 1)}"
        store.set(f"{occasion}/{launch.rank}", "")
        if store.add(f"{occasion}/count", 1) == launch.size:
            store.set(f"{occasion}/all", "")

        def missing() -> str:
            there = [store.check([f"{occasion}/{rank}"]) for rank in range(launch.size)]
            return f"rank {', '.join(str(rank) for rank, is_there in enumerate(there) if not is_there)}"

        wait_for(store, [f"{occasion}/all"], missing)

    def launch(self) -> Launch:
        """Which of how many ranks this process is."""
        return Launch.from_env()

    @abstractmethod
    def torch_name(self) -> str:
        """The name that torch.distributed knows."""

    @abstractmethod
    def device(self, launch: Launch) -> torch.device:
        """This rank's device.

        Raises:
            ConfigError: the machine lacks it.
        """

    def settle(self, exchange: Callable[[str], list[str]]) -> list[str]:
        """Called on every rank once all can take part, before they connect; may change the environment.

        Args:
            exchange: gives this rank's text to all, and answers with every rank's, in rank order; all ranks call it
                equally often.

        Returns:
            Lines for the log.
        """
        return []

    def join(self, launch: Launch) -> World:
        """Start the groups between the ranks of `launch`; as `connect_ranks`, which calls it."""
        return _joined(self, launch)

    def refuse_compiling(self) -> None:
        """Called where the model is to be compiled.

        Raises:
            ConfigError: this library can't go with torch.compile.
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
        return gpu_of(self, launch)


@dataclass(kw_only=True)
class AutoBackend(Backend):
    """NCCL where every rank of the machine has a GPU, else Gloo on CPU."""

    def torch_name(self) -> str:
        return "nccl" if torch.cuda.is_available() else "gloo"

    def device(self, launch: Launch) -> torch.device:
        chosen = NCCLBackend if torch.cuda.is_available() else GlooBackend
        return chosen(timeout_s=self.timeout_s, interface=self.interface).device(launch)


@dataclass(kw_only=True)
class NeuronBackend(Backend):
    """Trainium, which is refused: there is a name for it, so that whoever tries is told what to use."""

    def torch_name(self) -> str:
        return "neuron"

    def device(self, launch: Launch) -> torch.device:
        raise ConfigError(
            "NeuronBackend: there is no way yet to train on Trainium here: torch-neuronx of PyPI is an empty package, "
            "AWS's own place for it has a beta for Python 3.12 and newer, and no strategy was tried on it. Use GPU "
            "instances with backend=efa or backend=nccl, or AWS's NeuronX Distributed in place of this (backend)."
        )


def gpu_of(backend: Backend, launch: Launch) -> torch.device:
    """One for each rank of this machine.

    Raises:
        ConfigError: there are fewer.
    """
    seen = torch.cuda.device_count()
    if seen < launch.local_size:
        raise ConfigError(
            f"{type(backend).__name__}: {launch.local_size} processes on this machine, but {seen} CUDA devices. "
            f"Start at most {seen} per machine, or use backend=gloo (backend)."
        )
    return torch.device("cuda", launch.local_rank)


def check_everywhere(what: str, check: Callable[[], None]) -> None:
    """Run `check` before ranks connect; it passes on all of them, or fails on all of them.

    Args:
        what: names the occasion; each rank comes to it equally often.
        check: looks at this machine alone, for instance whether a library is installed.

    Raises:
        ConfigError: `check` raised it on some rank; the lowest rank's message, on every rank.
    """
    launch = Launch.from_env()
    store = open_store(launch)
    number = store.add(f"{what}/{launch.rank}", 1)
    error: ConfigError | None = None
    try:
        check()
    except ConfigError as caught:
        error = caught
    agree(store, launch, f"{what}/checked/{number}", error)


def connect_ranks(backend: Backend) -> World:
    """Start `backend` between the ranks of this launch, and the two CPU groups beside it.

    Every rank is heard before the first collective: a machine without the device that the others
    have makes all ranks refuse, with one message.

    Raises:
        ConfigError: some rank can't take part; the same message on every rank.
        TrainingError: the library itself fails to start.
    """
    return backend.join(backend.launch())


def _joined(backend: Backend, launch: Launch) -> World:
    store = open_store(launch)
    # Every rank connects equally often; a second time must not meet the keys of the first.
    connection = store.add(f"connections/{launch.rank}", 1)
    error: ConfigError | None = None
    device = torch.device("cpu")
    interfaces: Interfaces | None = None
    try:
        if backend.interface is not None:
            interfaces = choose(backend.interface)
        device = backend.device(launch)
    except ConfigError as caught:
        error = caught
    agree(store, launch, f"connect/{connection}", error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    said = _set_interfaces(interfaces, launch)
    numbers = itertools.count()
    said += backend.settle(lambda text: exchange(store, launch, f"settle/{connection}/{next(numbers)}", text))
    if launch.size == 1 and "MASTER_ADDR" not in os.environ:
        # An in-memory store has no address to rendezvous at: a file-less group of one.
        store = dist.HashStore()
    timeout = timedelta(seconds=backend.timeout_s)
    with sharing_device(), _in_one_line(backend):
        dist.init_process_group(
            backend.torch_name(),
            store=dist.PrefixStore(f"groups/{connection}", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        control, checkpoint = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    world = World(
        rank=launch.rank,
        local_rank=launch.local_rank,
        size=launch.size,
        local_size=launch.local_size,
        data_rank=launch.rank,
        data_size=launch.size,
        device=device,
        store=store,
        control=control,
        checkpoint=checkpoint,
    )
    return replace(world, notes=_merged(world.collect([platform.node(), said])))


@contextlib.contextmanager
def _in_one_line(backend: Backend) -> Iterator[None]:
    """NCCL's own errors, such as a network that isn't there, end with the reason."""
    try:
        yield
    except dist.DistBackendError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise TrainingError(
            f"{type(backend).__name__}: {backend.torch_name()} does not start: {reason}. "
            "Start again with NCCL_DEBUG=INFO in the environment to see what it tried (backend)."
        ) from error


def _set_interfaces(chosen: Interfaces | None, launch: Launch) -> list[str]:
    """Tell both libraries; says what gives way to it."""
    if chosen is None:
        if launch.on_one_machine and (own := loopback()):
            for library in ("GLOO", "NCCL"):  # nobody else needs to reach these ports
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", own)
        return []
    said = []
    for name, value in (("GLOO_SOCKET_IFNAME", chosen.for_gloo()), ("NCCL_SOCKET_IFNAME", chosen.for_nccl())):
        if os.environ.get(name, value) != value:
            said.append(f"{name}={os.environ[name]} gives way to {value} (backend.interface)")
        os.environ[name] = value
    return said


def _merged(answers: list[tuple[str, list[str]]] | None) -> tuple[str, ...]:
    """The lines of rank 0, and of each other machine what differs from them."""
    if answers is None:
        return ()
    (first, common), *others = answers
    theirs = (f"{host}: {line}" for host, lines in others for line in lines if host != first and line not in common)
    return tuple(dict.fromkeys([*common, *theirs]))


_devices: list[Any] = []
"""Gloo's of this connection."""


@contextlib.contextmanager
def sharing_device() -> Iterator[None]:
    """Within, groups of Gloo are made on the devices of this connection.

    A device of its own would bring each a thread that wakes up a hundred times a second, for as long as the group
    lives: 1.4 % of a core here. torch's Python has no way to say so, though its C++ has.
    """
    ours: Any = distributed_c10d.ProcessGroupGloo
    if not _devices:
        named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
        _devices.extend(ours.create_device(interface=name) if name else ours.create_default_device() for name in named)

    class Sharing(ours):  # type: ignore[misc]
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = ours._Options()
            options._devices, options._threads, options._timeout = _devices, 2 * len(_devices), timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ours  # type: ignore[misc]


def disconnect_ranks() -> None:
    """Take down what `connect_ranks` and later groups have set up; nothing if nothing is."""
    topology = sys.modules.get("torch.distributed.tensor._collective_utils")
    if topology is not None:  # it remembers every mesh, and with it the groups
        topology.MeshTopoInfo.build_from_mesh.cache_clear()
    if "torch.distributed.tensor" in sys.modules:  # what it remembers of operations holds their meshes, too
        propagator = sys.modules["torch.distributed.tensor"].DTensor._op_dispatcher.sharding_propagator
        memories = [propagator.propagate_op_sharding, getattr(propagator, "_propagate_tensor_meta_cached", None)]
        for clear in (*(getattr(each, "cache_clear", None) for each in memories), getattr(torch._C, _NATIVE, None)):
            if clear is not None:
                clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    _devices.clear()


_NATIVE = "_clear_DTensor_sharding_propagator_cache"
