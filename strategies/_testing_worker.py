"""One worker of the pool: waits on a pipe, runs one job at a time, and leaves nothing of it behind.

Started by `strategies._testing_pool`. The parent sends a `Task`, hears a `Reply`, says `RELEASE`
once every rank has answered, and hears `READY` when the worker is clean again. A parent that
disappears closes the pipe, and the worker ends at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import psutil

RELEASE = b"release"
READY = b"ready"
_MORE_THREADS = 30
_MOST_THREADS = 200
"""Of groups that jobs left behind: each has one that wakes a hundred times a second. A new worker costs less."""
_threads = 0  # that were left when all was looked through the last time


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one rank is to do."""

    function: str
    """`module:qualname`."""
    arguments: bytes
    """A pickled tuple; opened only after `path` and `modules` are in place."""
    path: list[str]
    modules: dict[str, str]
    """Files of modules that may not be found along `path` (pytest can import test modules from anywhere)."""
    folder: str
    environment: Mapping[str, str]
    filters: bytes
    """The caller's warning filters, pickled: what is an error there is an error here."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of it."""

    value: Any = None
    kind: str | None = None
    """Name of the exception's class; None: it returned."""
    message: str = ""
    trace: str = ""
    at: float = 0.0
    """`time.monotonic()` of the exception: who was first, when others fail of it."""


class _FromFiles:
    """Finds modules that the parent has, and that no folder of `sys.path` leads to."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.files.get(name)
        return None if file is None else importlib.util.spec_from_file_location(name, file)


def serve(connection: Connection) -> None:
    """Run jobs until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    finder = _FromFiles()
    sys.meta_path.append(finder)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    gc.freeze()
    connection.send_bytes(READY)
    while True:
        task = pickle.loads(inbox.get())  # noqa: S301 - all of it comes from the process that started this one
        with _as_it_was():
            connection.send_bytes(_answer(task, finder))
            while inbox.get() != RELEASE:
                pass
            _tear_down()
        if psutil.Process().num_threads() > _MOST_THREADS:
            os._exit(0)  # the pool starts a new one
        connection.send_bytes(READY)


def _listen(connection: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _answer(task: Task, finder: _FromFiles) -> bytes:
    try:
        reply = Reply(value=_run(task, finder))
        return pickle.dumps(reply)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: the worker outlives its jobs
        reply = Reply(kind=type(error).__name__, message=str(error), trace=_trace(error), at=time.monotonic())
        # The others may be waiting for this rank inside a collective: hang up, so that they notice.
        error.__traceback__ = None
    _tear_down()
    return pickle.dumps(reply)


def _trace(error: BaseException) -> str:
    frames = traceback.TracebackException.from_exception(error)
    frames.stack = traceback.StackSummary.from_list([f for f in frames.stack if f.filename != __file__])
    return "".join(frames.format())


def _run(task: Task, finder: _FromFiles) -> Any:
    os.environ.clear()
    os.environ.update(task.environment)
    os.chdir(task.folder)
    sys.path[:] = task.path
    finder.files.update(task.modules)
    for name, file in task.modules.items():
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(loaded, "__file__", None) != file:
            del sys.modules[name]
    importlib.invalidate_caches()
    _seed()
    with warnings.catch_warnings():
        warnings.filters[:] = pickle.loads(task.filters)  # type: ignore[index]  # noqa: S301
        warnings._filters_mutated()  # type: ignore[attr-defined]
        function = _resolve(task.function)
        return function(*pickle.loads(task.arguments))  # noqa: S301


def _resolve(reference: str) -> Callable[..., Any]:
    module, _, qualname = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    assert callable(found), reference
    return found  # type: ignore[no-any-return]


def _seed() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what a job may have changed in this process."""
    import torch

    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        for number, handler in handlers.items():
            _restore(number, handler)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def _restore(number: int, handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    if handler is not None:
        signal.signal(number, handler)


def _tear_down() -> None:
    """Close every connection to the other ranks."""
    global _threads
    from strategies import backends, world

    world.open_store.cache_clear()
    backends.disconnect_ranks()
    gc.collect()  # groups that a dead cycle still holds
    if psutil.Process().num_threads() > _threads + _MORE_THREADS:  # of groups that were frozen before they died
        gc.unfreeze()
        gc.collect()
        _threads = psutil.Process().num_threads()
    gc.freeze()  # what a job has imported needn't be looked through after each of the next
