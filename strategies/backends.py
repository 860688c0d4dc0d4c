"""How the ranks talk: the backend's own rules, apart from what is said over it."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from strategies.errors import ConfigError
from strategies.meeting import MEETING, wait_for
from strategies.world import Launch, World, agree, open_store

_LONGEST_S = 7 * 24 * 3600


@dataclass(kw_only=True)
class Backend(ABC):
    """A communication library and the kind of device that it serves."""

    timeout_s: float = 1800.0
    """Seconds after which a collective that doesn't finish is an error."""
    interface: str | None = None
    """Network interface to use, such as `eth0`; the library chooses when it is null."""
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

    @abstractmethod
    def torch_name(self) -> str:
        """The name that torch.distributed knows."""

    @abstractmethod
    def device(self, launch: Launch) -> torch.device:
        """This rank's device.

        Raises:
            ConfigError: the machine lacks it.
        """

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
        return _gpu(self, launch)


@dataclass(kw_only=True)
class AutoBackend(Backend):
    """NCCL where every rank of the machine has a GPU, else Gloo on CPU."""

    def torch_name(self) -> str:
        return "nccl" if torch.cuda.is_available() else "gloo"

    def device(self, launch: Launch) -> torch.device:
        chosen = NCCLBackend if torch.cuda.is_available() else GlooBackend
        return chosen(timeout_s=self.timeout_s, interface=self.interface).device(launch)


@dataclass(kw_only=True)
class SMDDPBackend(Backend):
    """SageMaker's data parallel library: its all-gather between P4d machines, and NCCL for all else.

    Raises:
        ConfigError: a buffer's size is out of range.
    """

    scratch_bytes: int | None = None
    """Scratch buffer of an all-gather; null: the library's own size, 16 MiB."""
    sort_bytes: int | None = None
    """Buffer in which what was gathered is put in order; null: the library's own size, 128 MiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in _BUFFERS:
            if (given := getattr(self, key)) is not None:
                _refuse_size(key, str(given))

    def torch_name(self) -> str:
        return "smddp"

    def refuse_compiling(self) -> None:
        raise ConfigError(
            "SMDDPBackend: compile=true can't go with backend=smddp, whose makers don't say that it works with "
            "torch.compile. Use compile=false or backend=nccl (compile, backend)."
        )

    def device(self, launch: Launch) -> torch.device:
        kind = _instance_type()
        if kind is not None and kind not in _WITH_SMDDP:
            raise ConfigError(
                f"SMDDPBackend: backend=smddp is for {' and '.join(_WITH_SMDDP)}, and this is {kind}. {_versions()}"
            )
        variables = os.environ
        by_mpi = [name for name in _ITS_MPIRUN if name in variables]
        if by_mpi and variables.get(_SHARDED, "").lower() != "true":
            raise ConfigError(
                f"SMDDPBackend: started by SageMaker's mpirun ({by_mpi[0]}), the library reduces gradients itself and "
                "allows no process group beside its own, and checkpoints need one. Start with torchrun, or set "
                f"{_SHARDED}=true for its all-gather alone (backend)."
            )
        self._set_buffers()
        try:
            importlib.import_module("smdistributed.dataparallel.torch.torch_smddp")
        except Exception as error:  # it also raises what it likes on a machine that it doesn't support
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(f"SMDDPBackend: its library can't be imported: {reason}. {_versions()}") from error
        if "cuda" not in dist.Backend.backend_capability.get(self.torch_name(), ["cuda"]):
            return torch.device("cpu")  # says what has registered itself under that name
        return _gpu(self, launch)

    def _set_buffers(self) -> None:
        """The library reads them from the environment, where the user may have put them too."""
        for key, variable in _BUFFERS.items():
            given, outside = getattr(self, key), os.environ.get(variable)
            if outside is not None:
                _refuse_size(key, outside)
            if given is not None and outside not in (None, str(given)):
                raise ConfigError(
                    f"SMDDPBackend: {key}={given}, and the environment has {variable}={outside}. "
                    f"Leave one of them out (backend.{key})."
                )
            if given is not None:
                os.environ[variable] = str(given)


_WITH_SMDDP = ("p4d.24xlarge", "p4de.24xlarge")
_BUFFERS = {
    "scratch_bytes": "SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES",
    "sort_bytes": "SMDDP_AG_SORT_BUFFER_SIZE_BYTES",
}
_PAGE = 8192
_ITS_MPIRUN = ("SMDATAPARALLEL_USE_SINGLENODE", "SMDATAPARALLEL_USE_HOMOGENEOUS")
_SHARDED = "SMDATAPARALLEL_OPTIMIZE_SDP"


def _refuse_size(key: str, text: str) -> None:
    if not text.isdigit() or int(text) < _PAGE or int(text) % _PAGE:
        raise ConfigError(
            f"SMDDPBackend: {key}={text} is not a multiple of {_PAGE} bytes, without which the library would leave "
            f"all to NCCL. Try 16777216 (backend.{key}, {_BUFFERS[key]})."
        )


def _versions() -> str:
    return (
        "The newest wheel of SMDDP (2.5.0) is for Python 3.11, torch 2.4.1 and CUDA 12.1; here are "
        f"Python {platform.python_version()}, torch {torch.__version__} and CUDA {torch.version.cuda or 'none'}. "
        "Use a container of AWS that has it, or backend=nccl (backend)."
    )


def _instance_type() -> str | None:
    """As far as this machine says so: in SageMaker's variable, or in the tables of EC2's firmware."""
    if said := os.environ.get("SM_CURRENT_INSTANCE_TYPE"):
        return said.removeprefix("ml.")
    tables = Path("/sys/devices/virtual/dmi/id")
    with contextlib.suppress(OSError):
        if (tables / "sys_vendor").read_text().strip() == "Amazon EC2":
            return (tables / "product_name").read_text().strip()
    return None


def _gpu(backend: Backend, launch: Launch) -> torch.device:
    """One for each rank of this machine."""
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
    elif launch.on_one_machine and (loopback := _loopback()):
        for library in ("GLOO", "NCCL"):  # nobody else needs to reach these ports
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    if launch.size == 1 and "MASTER_ADDR" not in os.environ:
        # An in-memory store has no address to rendezvous at: a file-less group of one.
        store = dist.HashStore()
    timeout = timedelta(seconds=backend.timeout_s)
    with sharing_device():
        dist.init_process_group(
            backend.torch_name(),
            store=dist.PrefixStore(f"groups/{connection}", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        control, checkpoint = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return World(
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
