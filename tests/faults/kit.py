"""Makes a plan's faults happen in this process, by wrapping the functions that are the phases."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.faults.plan import LOG, SIGNALS, Fault, planned

if TYPE_CHECKING:
    import psutil

_NUMBERS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "freeze": signal.SIGSTOP}


class Kit:
    """The faults that this rank is the witness of.

    Args:
        faults: all of a start.
        rank: of this process.
        life: how often the launcher restarted the workers; others' faults don't count.
        log: file for a line per fault; None: no file.
    """

    def __init__(self, faults: Sequence[Fault], rank: int, life: int = 0, log: str | None = None) -> None:
        self._faults = [fault for fault in faults if fault.witness == rank and fault.life == life]
        self._rank, self._life = rank, life
        self._log = log
        self._launcher = os.getppid()
        self._counts: Counter[str] = Counter()
        self._ran = False

    @classmethod
    def from_environment(cls) -> Kit:
        """For a script that a launcher starts."""
        life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return cls(planned(), int(os.environ.get("RANK", 0)), life, os.environ.get(LOG))

    @contextlib.contextmanager
    def armed(self) -> Iterator[Kit]:
        """Wrap what there is to wrap; everything is as before when the context is left."""
        import torch

        from trainer.checkpoint.checkpointer import Checkpointer
        from trainer.data import language
        from trainer.session import Session

        with contextlib.ExitStack() as stack:
            for owner, name, phase in (
                (Checkpointer, "_share", "staging"),
                (Checkpointer, "_stage", "staging"),
                (Checkpointer, "_write", "writing"),
                (Checkpointer, "_publish", "publishing"),
                (Checkpointer, "_sweep", "sweeping"),
                (Session, "evaluate", "evaluation"),
                (language, "_write", "tokenising"),
            ):
                stack.enter_context(mock.patch.object(owner, name, self._within(phase, getattr(owner, name))))
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", self._backward(torch.Tensor.backward)))
            stack.enter_context(mock.patch.object(Session, "next_step", self._running(Session.next_step)))
            yield self

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase; its faults strike inside."""
        due = self.enter(phase)
        strikes = [_Strike(fault.delay_s, functools.partial(self._send, fault)) for fault in due if _is_signal(fault)]
        with contextlib.ExitStack() as stack:
            for fault in due:
                if fault.kind == "full":
                    stack.enter_context(disk_full(fault.num_bytes))
                elif fault.kind == "limit":
                    stack.enter_context(file_limit(fault.num_bytes))
            for strike in strikes:
                stack.callback(strike.now)
            yield

    def enter(self, phase: str) -> list[Fault]:
        """Count the phase; what befalls it at once happens here, the rest is returned."""
        self._counts[phase] += 1
        number = self._counts[phase]
        for fault in self._faults:
            if fault.kind == "slow" and fault.phase == phase and number >= fault.occurrence:
                time.sleep(fault.seconds)
        due = [fault for fault in self._faults if fault.phase == phase and fault.occurrence == number]
        for fault in due:
            if not _is_signal(fault):
                self._note(fault)
            if fault.kind == "error":
                raise RuntimeError(f"planned fault in {phase}")
            if fault.kind == "memory":
                raise MemoryError(f"planned fault in {phase}")
        return due

    def begin(self, phase: str) -> None:
        """Enter a phase that lasts until the end."""
        for fault in self.enter(phase):
            if _is_signal(fault):
                _Strike(fault.delay_s, functools.partial(self._send, fault))

    def _within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return function(*args, **kwargs)

        return wrapped

    def _backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        inner = self._within("all_reduce", function)

        @functools.wraps(function)
        def wrapped(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            number = self._counts["all_reduce"] + 1
            if any(fault.kind == "nan" and fault.occurrence == number for fault in self._faults):
                tensor = tensor * float("nan")
            return inner(tensor, *args, **kwargs)

        return wrapped

    def _running(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self._ran:
                self._ran = True
                self.begin("running")
            return function(*args, **kwargs)

        return wrapped

    def _send(self, fault: Fault) -> None:
        target = self._process(fault.victim)
        if fault.kind == "freeze":  # whom it hits can't wake itself
            wake = f"import os, time; time.sleep({fault.seconds}); os.kill({target}, {int(signal.SIGCONT)})"
            subprocess.Popen([sys.executable, "-S", "-c", wake], start_new_session=True)
        self._note(fault)
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, _NUMBERS[fault.kind])

    def _process(self, victim: str) -> int:
        if victim == f"rank {self._rank}":
            return os.getpid()
        if victim == "launcher":
            assert os.getppid() == self._launcher != 1, "the launcher is gone already"
            return self._launcher
        worker = workers_of(self._launcher).get(int(victim.removeprefix("rank ")))
        if worker is None:
            raise ProcessLookupError(victim)
        return int(worker.pid)

    def _note(self, fault: Fault) -> None:
        if self._log is None:
            return
        line = {"kind": fault.kind, "victim": fault.victim, "phase": fault.phase, "life": self._life,
                "at": time.time(), "pid": os.getpid()}  # fmt: skip
        file = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, json.dumps(line).encode() + b"\n")
        os.close(file)


def _is_signal(fault: Fault) -> bool:
    return fault.kind in SIGNALS


class _Strike:
    """Calls `act` once: after a delay, or when told that there is no more time."""

    def __init__(self, delay_s: float, act: Callable[[], None]) -> None:
        self._over = threading.Event()
        self._delay_s, self._act = delay_s, act
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        self._over.wait(self._delay_s)
        self._act()

    def now(self) -> None:
        self._over.set()
        self._thread.join()


def workers_of(launcher: int) -> dict[int, psutil.Process]:
    """By rank.

    Args:
        launcher: its process ID.
    """
    import psutil

    found = {}
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error, KeyError):  # one that ended meanwhile; one that is no worker
            found[int(child.environ()["RANK"])] = child
    return found


@contextlib.contextmanager
def disk_full(num_bytes: int = 0) -> Iterator[None]:
    """Whatever the store: checkpoint files take `num_bytes` more between them, then ENOSPC (a patched write)."""
    from trainer.checkpoint.store import HashedFile

    left, real = [num_bytes], HashedFile.write

    def write(file: HashedFile, data: Any) -> int:
        left[0] -= memoryview(data).nbytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with mock.patch.object(HashedFile, "write", write):
        yield


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `num_bytes`: the kernel answers EFBIG (RLIMIT_FSIZE, nothing patched)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.getsignal(signal.SIGXFSZ)  # ignored by Python from the start
    assert before == signal.SIG_IGN, "SIGXFSZ would kill this process"
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
