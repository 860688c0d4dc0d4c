"""Worker processes that are started once per test run and lent to one job after another."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, Any

from strategies._testing_worker import READY, RELEASE, Reply, Task

_GRACE_S = 15.0
"""How long the other ranks may go on once one has failed."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from multiprocessing.connection import Connection; from strategies._testing_worker import serve; "
    "serve(Connection(int(sys.argv[1])))"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank made of a job."""

    rank: int
    value: Any = None
    error: str | None = None
    """Name of the exception's class, `Timeout`, or `Died`; None: the function returned `value`."""
    message: str = ""
    trace: str = ""
    printed: str = ""
    at: float = 0.0
    """When it failed, on the machine's monotonic clock."""

    def __str__(self) -> str:
        if self.error is None:
            text = f"rank {self.rank} returned {_short(repr(self.value))}\n"
        else:
            text = f"rank {self.rank}: {self.error}: {self.message}\n{self.trace}"
        return text + (f"rank {self.rank} printed:\n{_ends(self.printed)}\n" if self.printed and self.error else "")


def _ends(text: str, each: int = 3000) -> str:
    """A process that aborts says why before all its stacks."""
    return text if len(text) <= 2 * each else f"{text[:each]}\n[...]\n{text[-each:]}"


class JobError(Exception):
    """A job failed on some rank; `outcomes` tells what each rank made of it, in rank order."""

    def __init__(self, name: str, outcomes: list[Outcome]) -> None:
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        first = min(failed, key=lambda outcome: outcome.at).rank
        ordered = sorted(outcomes, key=lambda outcome: (outcome.error is None, outcome.rank != first, outcome.rank))
        lines = "\n".join(str(outcome) for outcome in ordered)
        super().__init__(f"{name} failed on {len(failed)} of {len(outcomes)} ranks; rank {first} first.\n{lines}")
        self.outcomes = outcomes


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]
    ready: bool = False

    def printed(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")


@dataclass(kw_only=True)
class Workers:
    """A pool of processes, each of which has torch imported and waits for work.

    Workers start when they are first needed, run as many jobs as come, and end with `close` (or
    with the process that started them, however that ends). A job of size n runs on the first n,
    with the variables that torchrun would set and a fresh store to meet at.
    """

    most: int = 4
    """Largest world size."""
    timeout_s: float = 120.0
    """Default for one job."""
    remembered: dict[Any, Any] = field(default_factory=dict, repr=False)
    """For results that several tests need; lives as long as the pool."""

    def __post_init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(
        self,
        function: Callable[..., Any],
        size: int,
        *arguments: Any,
        timeout: float | None = None,
        local_size: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call `function(*arguments)` on `size` ranks at once.

        Args:
            function: at the top level of a module (a test module too).
            size: 1 to `most`.
            *arguments: what pickle takes; tensors are copied.
            timeout: seconds; default `timeout_s`.
            local_size: ranks per pretended machine; default all.
            environment: further variables for the job.

        Returns:
            What each rank returned, in rank order.

        Raises:
            JobError: some rank raised, died, or didn't finish in time.
        """
        outcomes = self._job(function, size, arguments, timeout, local_size, environment)
        if any(outcome.error is not None for outcome in outcomes):
            raise JobError(_name(function), outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        function: Callable[..., Any],
        size: int,
        *arguments: Any,
        timeout: float | None = None,
        local_size: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[Outcome]:
        """As `run`, for jobs that are meant to fail: tells what each rank made of it, and raises nothing."""
        return self._job(function, size, arguments, timeout, local_size, environment)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that live now."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End every worker. May be called twice."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(5.0)
        self._kill()

    def _job(
        self,
        function: Callable[..., Any],
        size: int,
        arguments: tuple[Any, ...],
        timeout: float | None,
        local_size: int | None,
        environment: Mapping[str, str] | None,
    ) -> list[Outcome]:
        from torch.distributed import TCPStore

        if not 1 <= size <= self.most:
            raise ValueError(f"Workers: size={size} is not in 1..{self.most}. Make a pool with a larger `most`.")
        self._grow(size)
        # The pool holds the store, as torchrun's agent does: no race for the port, and it outlives each rank.
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
            port = int(listening.getsockname()[1])
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        for rank, worker in enumerate(self._workers[:size]):
            os.ftruncate(worker.log.fileno(), 0)
            variables = _variables(rank, size, local_size or size, store.port)
            task = _task(function, arguments, {**variables, **(environment or {})})
            worker.connection.send_bytes(pickle.dumps(task))
        outcomes = self._collect(size, self.timeout_s if timeout is None else timeout)
        for outcome in outcomes:
            for line in outcome.printed.splitlines():
                sys.stdout.write(f"[rank {outcome.rank}] {line}\n")
        self._release(size)
        del store
        return outcomes

    def _collect(self, size: int, timeout: float) -> list[Outcome]:
        """Wait for every rank's answer; on a timeout, take every rank's stack and kill the pool."""
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        while len(found) < size:
            waiting = {self._workers[rank].connection: rank for rank in range(size) if rank not in found}
            readable = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not readable:
                found.update(self._give_up(sorted(waiting.values()), timeout))
                break
            for connection in readable:
                rank = waiting[connection]  # type: ignore[index]
                found[rank] = self._hear(rank)
                if found[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return [found[rank] for rank in range(size)]

    def _hear(self, rank: int) -> Outcome:
        worker = self._workers[rank]
        try:
            reply = pickle.loads(worker.connection.recv_bytes())  # noqa: S301 - from a process that we started
        except (EOFError, OSError):
            code = worker.process.wait()
            return Outcome(
                rank=rank,
                error="Died",
                message=f"exit code {code}",
                printed=worker.printed(),
                at=time.monotonic(),
            )
        assert isinstance(reply, Reply)
        return Outcome(
            rank=rank,
            value=reply.value,
            error=reply.kind,
            message=reply.message,
            trace=reply.trace,
            at=reply.at,
            printed=worker.printed(),
        )

    def _give_up(self, ranks: list[int], timeout: float) -> dict[int, Outcome]:
        for rank in ranks:
            self._workers[rank].process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)  # for faulthandler to write
        late = {
            rank: Outcome(
                rank=rank,
                error="Timeout",
                message=f"no answer within {timeout:g} s, or {_GRACE_S:g} s after another rank failed",
                printed=self._workers[rank].printed(),
                at=time.monotonic(),
            )
            for rank in ranks
        }
        self._kill()
        return late

    def _release(self, size: int) -> None:
        """Let the workers tidy up together, once nobody can need anybody any more."""
        workers = self._workers[:size]
        try:
            for worker in workers:
                worker.connection.send_bytes(RELEASE)
            for worker in workers:
                if not worker.connection.poll(30.0) or worker.connection.recv_bytes() != READY:
                    raise EOFError
        except (EOFError, OSError):  # died in the job, or while tidying: the next job gets new ones
            self._kill()

    def _grow(self, size: int) -> None:
        while len(self._workers) < size:
            self._workers.append(_start())
        for worker in self._workers[:size]:
            if not worker.ready:
                if not worker.connection.poll(300.0) or worker.connection.recv_bytes() != READY:
                    raise RuntimeError(f"Workers: a worker doesn't start: {worker.printed()}")
                worker.ready = True

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
            worker.log.close()
        self._workers.clear()


def _start() -> _Worker:
    import json

    mine, theirs = Pipe()
    log = tempfile.TemporaryFile("ab")  # noqa: SIM115 - lives as long as the worker
    environment = {**os.environ, **_QUIET}
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _START, str(theirs.fileno()), json.dumps(_path())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return _Worker(process=process, connection=mine, log=log)


_QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
          "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
if "lo" in {name for _, name in socket.if_nameindex()}:
    _QUIET["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead anywhere


def _path() -> list[str]:
    return [str(Path(folder).absolute()) for folder in sys.path]


def _variables(rank: int, size: int, local_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        **_QUIET,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": str(rank // local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _task(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> Task:
    if "<" in function.__qualname__:
        raise ValueError(
            f"Workers: {function.__qualname__} is a local function. Put it at the top level of its module."
        )
    modules: dict[str, str] = {}
    for value in (function, *arguments):
        file = getattr(sys.modules.get(getattr(value, "__module__", "")), "__file__", None)
        if file is not None:
            modules[value.__module__] = file
    return Task(
        function=_name(function),
        arguments=pickle.dumps(arguments),
        path=_path(),
        modules=modules,
        folder=str(Path.cwd()),
        environment=environment,
        filters=pickle.dumps([each for each in warnings.filters if _is_known(each[2])]),
    )


def _is_known(category: type[Warning] | tuple[type[Warning], ...]) -> bool:
    """Whether a worker can have this warning class without importing the test runner."""
    return isinstance(category, type) and not category.__module__.startswith(("_pytest", "pytest"))


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
