"""Horovod between the ranks of a launch, whoever launched them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from strategies.errors import ConfigError
from strategies.world import Launch, World, publish

_LOCALHOST = "127.0.0.1"
_ONCE = ("HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD")
_started: list[int] = []
"""Sizes of the worlds in which this process has been."""
_STALLED_S = 60
"""After which Horovod names the ranks that it waits for."""


def library() -> Any:
    """`horovod.torch`.

    Raises:
        ConfigError: it isn't installed, or was built against another torch.
    """
    try:
        import horovod.torch
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "horovod":
            raise ConfigError(
                f"HorovodStrategy: Horovod needs {error.name}, which isn't installed. Install it with pip (strategy)."
            ) from error
        raise ConfigError(
            "HorovodStrategy: Horovod isn't installed. Build it against this torch with scripts/install_horovod.sh, "
            "or use strategy=ddp (strategy)."
        ) from error
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"HorovodStrategy: the installed Horovod doesn't go with torch {torch.__version__} ({error}). Build it "
            "again with scripts/install_horovod.sh, or use strategy=ddp (strategy)."
        ) from error
    if not hasattr(horovod.torch, "allreduce_async_"):  # it prints why, and goes on
        raise ConfigError(
            "HorovodStrategy: the installed Horovod was built without torch. Build it with scripts/install_horovod.sh, "
            "or use strategy=ddp (strategy)."
        )
    return horovod.torch


def uses_mpi(launch: Launch) -> bool:
    """Whether Horovod's ranks talk over MPI: started by it, and built with it."""
    return launch.by_mpi and bool(library().mpi_built())


def refuse_another_start(launch: Launch) -> None:
    """MPI starts once in a process; and Horovod 0.28 dies of a second start where some variables are set.

    Raises:
        ConfigError: this would be a second start.
    """
    if _started and uses_mpi(launch):
        raise ConfigError("HorovodStrategy: MPI can't start twice in one process. Give each run its own (strategy).")
    for name in _ONCE if _started else ():
        if name in os.environ:
            raise ConfigError(
                f"HorovodStrategy: Horovod can't start twice in one process with {name}={os.environ[name]}. Unset it, "
                f"or give each run a process of its own ({name})."
            )


def start(world: World, number: int, timeout_s: float) -> None:
    """Connect Horovod on every rank; collective.

    The launcher may be any: where it isn't MPI, rank 0 runs the server at which Horovod's ranks find each other, and
    each is told who it is in the variables that Horovod reads.

    Args:
        world: connected already.
        number: of the connection among those of the launch.
        timeout_s: seconds after which a collective that not all ranks have started is an error.

    Raises:
        RuntimeError: it counts the ranks in another way than the launcher.
    """
    horovod = library()
    launch = Launch.from_env()
    if horovod.is_initialized():  # by a strategy that nobody closed
        horovod.shutdown()
    variables = _patience(timeout_s)
    if uses_mpi(launch):
        _initialise(world, variables)
        return
    with _meeting_place(world, launch, number) as (host, port):
        _initialise(world, {**variables, **_who(world), "HOROVOD_GLOO_RENDEZVOUS_ADDR": host,
                            "HOROVOD_GLOO_RENDEZVOUS_PORT": port, "HOROVOD_CONTROLLER": "gloo",
                            "HOROVOD_CPU_OPERATIONS": "gloo"})  # fmt: skip


def stop() -> None:
    """Disconnect; ranks that still wait for this one get an error."""
    library().shutdown()


def _initialise(world: World, variables: Mapping[str, str]) -> None:
    horovod = library()
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):  # chosen by `connect_ranks`
        variables = {"HOROVOD_GLOO_IFACE": interface.split(",")[0], **variables}
    _started.append(world.size)
    with _environment(variables):
        horovod.init()
    if (horovod.rank(), horovod.size()) != (world.rank, world.size):
        raise RuntimeError(
            f"Horovod counts this process as {horovod.rank()} of {horovod.size()}, its launcher as {world.rank} of "
            f"{world.size}"
        )
    world.barrier()  # whoever fails before it ends, and so is heard by those who wait here


def _patience(timeout_s: float) -> dict[str, str]:
    """How long ranks wait for each other, in whole seconds; the limit must be above the time of the first complaint."""
    limit = max(2, int(timeout_s))
    return {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(limit),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(limit),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(min(_STALLED_S, limit - 1)),
    }


def _who(world: World) -> dict[str, str]:
    """This rank as Horovod names it. Collective. Across: the ranks with the same number on each machine."""
    local_ranks = world.gather(world.local_rank)
    across = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == world.local_rank]
    numbers = {
        "RANK": world.rank,
        "SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_SIZE": world.local_size,
        "CROSS_RANK": across.index(world.rank),
        "CROSS_SIZE": len(across),
    }
    names = {f"HOROVOD_{name}": str(value) for name, value in numbers.items()}
    return {**names, "HOROVOD_HOSTNAME": f"machine-{world.rank - world.local_rank}"}


@contextlib.contextmanager
def _meeting_place(world: World, launch: Launch, number: int) -> Iterator[tuple[str, str]]:
    """Address and port of Horovod's rendezvous server; rank 0 runs it for as long as the block takes."""
    servers = []

    def serve() -> str:
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

        host = _LOCALHOST if launch.on_one_machine else os.environ.get("MASTER_ADDR") or socket.getfqdn()
        server = RendezvousHTTPServer((_LOCALHOST if launch.on_one_machine else "", 0), RendezvousHandler, 0)
        server.init([])  # no slots: entries stay until the server ends, so that no slow rank comes too late for them
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), name="horovod-rendezvous", daemon=True).start()
        return f"{host} {server.server_address[1]}"

    host, port = publish(world.store, launch, f"horovod/{number}/server", serve).split()
    try:
        yield host, port
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that are read inside, and gone afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
