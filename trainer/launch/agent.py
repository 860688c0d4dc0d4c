"""torchrun's agent, with what `launch` promises of exit codes, restarts and leave-taking."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

LEAVE_S = 600
"""How long workers that were told to stop may write their checkpoint; bare torchrun kills them after 30 s."""
_ARRIVE_S = 900
"""How much later than another machine one may be up."""
_LOOK_S = 0.5
_ALONE_S = 30
_NOTICE_S = 8
"""How long a worker that another one's crash left behind may take to notice by itself, which is a matter of seconds;
one that is still starting has to be told."""
_FOLLOW_S = 25
"""How long it may stay."""


_FINAL = (EXIT_WRONG_INPUT, EXIT_STOPPED)
"""Exit codes after which the same start would end the same way, or a person wanted the end."""


def telling(codes: Iterable[int]) -> int:
    """Of the workers' exit codes the one that says why the run ended; 0 if all did well.

    Wrong input is everybody's. After a crash the others are told to end, and may do so in good order.
    """
    found = [code for code in codes if code != 0]

    def weight(code: int) -> int:
        if code == EXIT_WRONG_INPUT:
            return 0
        if code in (EXIT_STOPPED, -signal.SIGTERM):
            return 3
        return 1 if code < 0 else 2

    return min(found, key=weight, default=0)


class Meeting(RendezvousHandler):
    """Where the agents of a run meet, one on each machine, which all know beforehand who they are.

    Args:
        store: of all agents.
        address: of the machine whose agent keeps the store.
        port: at which it listens.
        machine: number of this one; 0 keeps the store.
        machines: how many there are.
        run_id: keeps runs apart.
    """

    def __init__(
        self, store: TCPStore, address: str, port: int, machine: int = 0, machines: int = 1, run_id: str = "run"
    ) -> None:
        self._store = store
        self._place = RendezvousStoreInfo(address, port)
        self._machine, self._machines = machine, machines
        self._run_id = run_id

    @classmethod
    def here(cls, run_id: str) -> Meeting:
        """Of this machine alone: at 127.0.0.1, where torchrun's own listens on every interface."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1024)
            port = int(listening.getsockname()[1])
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        return cls(store, "127.0.0.1", port, run_id=run_id)

    @classmethod
    def among(cls, addresses: Sequence[str], machine: int, port: int) -> Meeting:
        """Of several machines; the first one listens on all its interfaces.

        Raises:
            ConfigError: the first machine can't be reached, or its port is taken.
        """
        from strategies.errors import ConfigError

        end = time.monotonic() + _ARRIVE_S
        try:
            while True:
                left = timedelta(seconds=max(1.0, end - time.monotonic()))
                store = TCPStore(addresses[0], port, is_master=machine == 0, wait_for_workers=False, timeout=left)
                if store.add(f"arrived/{machine}", 1) == 1:
                    return cls(store, addresses[0], port, machine, len(addresses))
                # This machine was started again, and the others, which are about to be, still wait for what it was.
                with contextlib.suppress(RuntimeError, DistNetworkError):
                    while time.monotonic() < end:
                        store.add(f"arrived/{machine}", 0)
                        time.sleep(_LOOK_S)
                    raise ConfigError(
                        f"launch: machine {machine} was started again, and the others weren't. End the job, and start "
                        "all of it."
                    )
        except (RuntimeError, DistNetworkError) as error:
            why = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"launch: machine {machine} can't meet the others at {addresses[0]}:{port}: {why}. Look whether it is "
                "up, and open the port between the machines."
            ) from error

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(PrefixStore(self._run_id, self._store), self._machine, self._machines, self._place)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is nobody to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class Agent(LocalElasticAgent):
    """Restarts workers after crashes only, and waits for those that were told to stop."""

    def exit_code(self, otherwise: int) -> int:
        """That of the worker that says why the run ended.

        Args:
            otherwise: the answer if no worker was started.
        """
        codes = [handler.proc.poll() for handler in self._handlers()]
        return shell_code(telling(code for code in codes if code is not None)) if codes else otherwise

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._let_follow()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.failures and telling(failure.exitcode for failure in result.failures.values()) in _FINAL:
            self._remaining_restarts = 0
        return result

    def _let_follow(self) -> None:
        """After a worker's end, the others say why and end too: being told would take the words out of their mouths.

        Where nobody was left to say anything, it is said here.
        """
        handlers = self._handlers()
        first: dict[int, int] = {}
        begin, seen_s, told = time.monotonic(), 0.0, False
        while True:
            codes = [handler.proc.poll() for handler in handlers]
            if not any(codes):
                return
            now_s = time.monotonic() - begin
            if not first:
                first = {rank: code for rank, code in enumerate(codes) if code not in (None, 0, EXIT_STOPPED)}
                seen_s = now_s
            if None not in codes or now_s > (seen_s + _FOLLOW_S if first else LEAVE_S):
                break
            if first and not told and now_s > seen_s + _NOTICE_S:
                told = True
                self._signal(signal.SIGTERM)
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        if first and all(code is None or code <= 0 or code == EXIT_STOPPED for code in codes):
            rank, code = next(iter(first.items()))
            sys.stderr.write(
                f"TrainingError: rank {rank} was ended by {signal.Signals(-code).name} (out of memory? see the "
                "kernel's log); start again to go on from the newest checkpoint\n"
            )

    def _signal(self, number: signal.Signals) -> None:
        """Those that are still there."""
        for handler in self._handlers():
            if handler.proc.poll() is None:
                handler.close(number)

    def _handlers(self) -> list[Any]:
        """Of the workers' processes, in rank order."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handlers[rank] for rank in sorted(handlers)]

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        done = worker_group.spec.max_restarts - self._remaining_restarts
        sys.stderr.write(f"starting again from the newest checkpoint ({done} of {worker_group.spec.max_restarts})\n")
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *rest: Any, **more: Any) -> None:
        if isinstance(sys.exc_info()[1], SignalException):
            self._let_leave(death_sig)
        super()._shutdown(death_sig, *rest, **more)

    def _let_leave(self, told: signal.Signals) -> None:
        """Pass a signal on, and wait for checkpoints; not for long where a worker died and the others wait for it."""
        handlers = self._handlers()
        self._signal(told)
        end = time.monotonic() + LEAVE_S
        while time.monotonic() < end:
            codes = [handler.proc.poll() for handler in handlers]
            if None not in codes:
                return
            if any(code not in (None, 0, EXIT_STOPPED) for code in codes):
                end = min(end, time.monotonic() + _ALONE_S)
            time.sleep(0.05)


def shell_code(code: int) -> int:
    """128 + the signal's number where a signal ended the process."""
    return code if code >= 0 else 128 - code
