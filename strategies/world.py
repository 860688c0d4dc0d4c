"""Who takes part in a run, and the small messages that the ranks exchange.

Nothing in here touches the device: counts, verdicts and names travel over a Gloo group on CPU,
so that asking never makes an accelerator wait.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from strategies.elastic import Elastic
from strategies.errors import ConfigError
from strategies.launchers import OPEN_MPI, number_in, started
from strategies.meeting import MEETING, failed_to_meet, wait_for

ReduceOp = Literal["sum", "min", "max"]
T = TypeVar("T")

_STORE_WAIT = dist.default_pg_timeout
_WAIT = timedelta(days=7)  # a dead rank is noticed by the launcher, a slow one is waited for
_FAREWELL = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says about this process, before any communication exists."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    restart: int = 0
    on_one_machine: bool = field(default=True, compare=False)
    """All ranks are known to be here; some launchers don't say how many ranks a machine has."""
    by: str | None = field(default=None, compare=False)
    """Who started the ranks, for people; None: this process is alone."""
    meeting: tuple[str | None, int | None] = field(default=(None, None), compare=False)
    """Address and port at which rank 0 can be met, as far as the launcher says so."""

    @classmethod
    def from_env(cls) -> Launch:
        """Read the variables that launchers set (`strategies.launchers`); without any, the process is alone.

        Raises:
            ConfigError: a variable is missing beside the others, isn't a number, or contradicts another launcher's.
        """
        found = started(os.environ)
        if found is None:
            return cls()
        return cls(
            rank=found.rank,
            local_rank=found.local_rank,
            size=found.size,
            local_size=found.local_size or found.size,
            restart=number_in(os.environ, "TORCHELASTIC_RESTART_COUNT", 0),
            on_one_machine=found.size in (1, found.local_size),
            by=found.by,
            meeting=(found.address, found.port),
        )

    @property
    def by_mpi(self) -> bool:
        """Open MPI's mpirun is the launcher."""
        return self.by == OPEN_MPI

    def describe(self) -> str:
        """One line for people: who started how many processes; where somebody did."""
        ranks = "1 process" if self.size == 1 else f"{self.size} processes"
        here = "" if self.on_one_machine else f", {self.local_size} on this machine"
        return f"started by {self.by}: {ranks}{here}"


@functools.cache
def open_store(launch: Launch) -> dist.Store:
    """The key-value store that all ranks of a launch share; exists before any process group.

    Keys are kept apart by run id and restart count, so that a restarted worker never reads
    what the previous incarnation wrote.
    """
    if launch.size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    note = _note_of(launch)
    if note is not None:
        store = _meet(launch, note)
    else:
        _say_where(launch)
        store = _rendezvous(launch)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "run")
    return dist.PrefixStore(f"shardwright/{run}/{launch.restart}", store)


def _note_of(launch: Launch) -> Callable[[str | None], str] | None:
    """The launcher's own means to make known where rank 0 is; None: the environment says it, or has to."""
    if "MASTER_PORT" in os.environ:
        return None
    if "HOROVOD_GLOO_RENDEZVOUS_PORT" in os.environ:
        return _note_at_horovodrun
    return _note_at_mpirun if launch.by_mpi and launch.on_one_machine and "PMIX_SERVER_TMPDIR" in os.environ else None


def _rendezvous(launch: Launch) -> dist.Store:
    limit = timedelta(seconds=MEETING.limit_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=launch.rank, world_size=launch.size, timeout=limit))
    except RuntimeError as error:
        raise failed_to_meet("{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ), error) from error
    store.set_timeout(_STORE_WAIT)
    return cast(dist.Store, store)


def _say_where(launch: Launch) -> None:
    """Put rank 0's address and port into the environment, where libraries too look for them.

    Raises:
        ConfigError: nobody says where it is.
    """
    address, port = launch.meeting
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if address and launch.on_one_machine else address)
    port = number_in(os.environ, "MASTER_PORT", port or 0)
    if not address or not 0 < port < 2**16:
        raise ConfigError(
            "Launch: nothing says where the ranks meet. Give all of them rank 0's address and a free port, as in "
            "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 (MASTER_ADDR, MASTER_PORT), or start them with torchrun."
        )
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _meet(launch: Launch, note: Callable[[str | None], str]) -> dist.Store:
    """A store on rank 0, at a port that it chooses and that `note` makes known to the others."""
    if launch.rank == 0:
        host = "127.0.0.1" if launch.on_one_machine else os.environ["HOROVOD_HOSTNAME"]
        with socket.create_server((host if launch.on_one_machine else "", 0), backlog=1024) as listening:
            port = int(listening.getsockname()[1])
            store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        note(f"{host} {port}")
        return store
    end = time.monotonic() + MEETING.limit_s
    while not (found := note(None)):
        if time.monotonic() > end:
            raise failed_to_meet("rank 0", "it isn't there")
        time.sleep(0.05)
    host, text = found.split()
    return dist.TCPStore(host, int(text), is_master=False, wait_for_workers=False)


def _note_at_horovodrun(text: str | None) -> str:
    """Leave `text` at the server that horovodrun keeps, or read what is there; empty: nothing yet."""
    import http.client

    host, port = (os.environ[f"HOROVOD_GLOO_RENDEZVOUS_{name}"] for name in ("ADDR", "PORT"))
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        connection.request("GET" if text is None else "PUT", "/shardwright/store", body=text)
        answer = connection.getresponse()
        return answer.read().decode() if answer.status == http.HTTPStatus.OK else ""


def _note_at_mpirun(text: str | None) -> str:
    """The same in the folder that mpirun makes for a job on this machine, and takes away after it."""
    path = Path(os.environ["PMIX_SERVER_TMPDIR"], "shardwright-store")
    if text is not None:
        unfinished = path.with_suffix(".new")
        unfinished.write_text(text)
        unfinished.replace(path)
    return path.read_text() if path.exists() else ""


def publish(store: dist.Store, launch: Launch, key: str, make: Callable[[], str]) -> str:
    """Let rank 0 decide `make()`; return its value on every rank. An error is everybody's error.

    Raises:
        ConfigError: rank 0's `make` raised it; the same message on every rank.
    """
    if launch.rank == 0:
        try:
            answer = {"value": make()}
        except Exception as error:  # the others are waiting: they must hear of it
            store.set(key, json.dumps({"error": str(error), "kind": type(error).__name__}))
            _heard_by_all(store, launch, key)
            raise
        store.set(key, json.dumps(answer))
    wait_for(store, [key], lambda: "rank 0")
    heard = json.loads(store.get(key))
    if "error" in heard:
        _heard_by_all(store, launch, key)
        raise ConfigError(heard["error"]) if heard["kind"] == "ConfigError" else RuntimeError(heard["error"])
    return str(heard["value"])


def agree(store: dist.Store, launch: Launch, key: str, error: ConfigError | None) -> None:
    """Before a process group exists: go on together, or raise together.

    Args:
        store: from `open_store`.
        launch: of this rank.
        key: names the occasion; used once per launch.
        error: what this rank found wrong, or None.

    Raises:
        ConfigError: some rank found something wrong; the lowest rank's message, on every rank.
    """
    store.set(f"{key}/{launch.rank}", "" if error is None else str(error))
    for rank in range(launch.size):
        wait_for(store, [f"{key}/{rank}"], functools.partial("rank {}".format, rank))
        message = store.get(f"{key}/{rank}").decode()
        if message:
            _heard_by_all(store, launch, key)
            raise ConfigError(message)


def exchange(store: dist.Store, launch: Launch, key: str, text: str) -> list[str]:
    """Before a process group exists: every rank's text, in rank order, on every rank. `key` is used once per launch."""
    store.set(f"{key}/{launch.rank}", text)
    answers = []
    for rank in range(launch.size):
        wait_for(store, [f"{key}/{rank}"], functools.partial("rank {}".format, rank))
        answers.append(store.get(f"{key}/{rank}").decode())
    return answers


def _heard_by_all(store: dist.Store, launch: Launch, key: str) -> None:
    """Before rank 0 ends with an error, and perhaps the store with it: let the others read why."""
    if launch.rank != 0:
        store.set(f"{key}/heard/{launch.rank}", "")
    elif launch.size > 1:
        with contextlib.suppress(RuntimeError):  # somebody died meanwhile: don't wait for ever
            store.wait([f"{key}/heard/{rank}" for rank in range(1, launch.size)], _FAREWELL)


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run as everything but the strategy sees them.

    `rank` and `size` count processes; `data_rank` and `data_size` count the data-parallel
    replicas, and only these decide who reads which samples and how losses are summed. With
    `data_leader` false, another rank already speaks for this replica in sums.

    `control` and `checkpoint` are Gloo groups on CPU over all ranks (None when alone): the first
    for messages of the loop, the second for the checkpoint writer, which may use it from a
    thread of its own.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    data_leader: bool = True
    device: torch.device
    store: dist.Store
    control: dist.ProcessGroup | None = None
    checkpoint: dist.ProcessGroup | None = None
    elastic: Elastic | None = None
    """How to go on when ranks are lost or join; None: the run ends with any of them."""
    notes: tuple[str, ...] = ()
    """What connecting has to say, for the log; on rank 0."""

    def reduce(self, values: Sequence[float], op: ReduceOp = "sum", *, votes: Sequence[float] = ()) -> list[float]:
        """Combine a few numbers over the data-parallel ranks; equal on every rank.

        Args:
            values: the same number of values on every rank.
            op: `sum` counts each replica once; `min` and `max` go over all ranks.
            votes: numbers in which every rank counts, not one per replica; the answers follow those of `values`.

        Returns:
            float64 precision, so whole numbers are exact up to 2**53.
        """
        return self.reduce_later(values, op, votes=votes)()

    def reduce_later(
        self, values: Sequence[float], op: ReduceOp = "sum", *, votes: Sequence[float] = ()
    ) -> Callable[[], list[float]]:
        """Start `reduce` now and return a function that waits for it.

        All ranks must start their messages in the same order; waiting may be in any order.
        """
        if self.control is None:
            return lambda: [float(value) for value in (*values, *votes)]
        mine = torch.tensor([*values, *votes], dtype=torch.float64)
        if op == "sum" and not self.data_leader:
            mine[: len(values)] = 0
        work = dist.all_reduce(mine, op=_OPS[op], group=self.control, async_op=True)

        def wait() -> list[float]:
            cast(dist.Work, work).wait()
            return cast(list[float], mine.tolist())

        return wait

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank."""
        if self.control is None:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.control)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.control)
        return [json.loads(bytes(part[: int(size)].numpy().tobytes())) for part, size in zip(parts, sizes, strict=True)]

    def collect(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value in rank order, on rank 0 alone; None on the others."""
        if self.control is None:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = torch.tensor([data.numel()])
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.control)
        padded = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0, group=self.control)
        return None if parts is None else [json.loads(bytes(part.numpy().tobytes())) for part in parts]

    def broadcast(self, value: T, source: int = 0) -> T:
        """Rank `source`'s JSON value, on every rank (a tuple comes back as a list)."""
        return cast(T, self.gather(value if self.rank == source else None)[source])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            self.reduce([0.0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on all ranks, or raise on all ranks.

        For work that may fail on one rank alone (a file that only one machine lacks). Nothing in
        the block may talk to other ranks.

        Raises:
            ConfigError: where the block raised it on some rank: the lowest rank's message, on all.
            RuntimeError: the same for any other error (the failing rank keeps its own).
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        mine = None if error is None else [type(error).__name__, str(error)]
        verdicts = self.gather(mine)
        if error is not None and not isinstance(error, ConfigError):
            raise error
        for rank, verdict in enumerate(verdicts):
            if verdict is not None:
                kind, message = verdict
                raise ConfigError(message) if kind == "ConfigError" else RuntimeError(f"rank {rank}: {kind}: {message}")

    def first(self, key: str, work: Callable[[], None]) -> None:
        """Run `work` on the first rank of each machine; the others wait for it, however long.

        The wait is on the store, not inside a collective, so that no group times out while a
        large data set is tokenised.

        Args:
            key: names the occasion; used once per run.
            work: what to do; its result must lie on disk.

        Raises:
            ConfigError: `work` raised it on this machine; the same on each of its ranks.
        """
        node = self.rank - self.local_rank
        slot = f"first/{key}/{node}"
        if self.local_rank == 0:
            try:
                work()
            except Exception as error:
                self.store.set(slot, json.dumps([type(error).__name__, str(error)]))
                raise
            self.store.set(slot, "null")
        self.store.wait([slot], _WAIT)
        verdict = json.loads(self.store.get(slot))
        if verdict is not None:
            kind, message = verdict
            raise ConfigError(message) if kind == "ConfigError" else RuntimeError(message)


_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
