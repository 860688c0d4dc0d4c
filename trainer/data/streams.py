"""Batches of the samples that a sampler names, made by worker processes or by this one.

Workers are started by a fork server. Plain fork would copy a process that already runs the threads
of its process group, of CUDA and of tokenizers, which deadlocks; spawn would import torch again in
every worker. The server is a fresh process without threads that imports torch once. It and its
workers ignore the signals that a terminal or a launcher sends to the whole process group: the
training process decides when they end, so that an interrupted step can still be finished and saved.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.data.base import Collate, Sample, Samples

Key: TypeAlias = tuple[int, int]
"""A sample's index, and the seed of whatever is random about it."""

_TOGETHER, _TOGETHER_S = 16, 1e-3
"""This process makes at most so many batches before it hands out the first, and starts none after so many seconds."""
_WRITER_ENDS_S = 5.0
"""Nobody reads from the other end any more, so that it can't wait."""
_DEAF_TO = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_PRELOADED = ["numpy", "torch.utils.data"]


class _Keyed(Dataset[tuple[Sample, int]]):
    """Samples looked up by key."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, key: Key) -> tuple[Sample, int]:
        index, seed = key
        return self._samples[index], seed


class _Collated:
    """A collate function for pairs of sample and seed."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, pairs: list[tuple[Sample, int]]) -> Batch:
        return self._collate([sample for sample, _ in pairs], [seed for _, seed in pairs])


def _follow_parent(_: int) -> None:
    """In a worker: leave as soon as the training process is gone, without a word.

    A fork server and its workers keep each other alive, and torch's own watch is on the server.
    """
    # What a worker itself fails at is sent to the training process. This is said by the thread that
    # hands over tensors when the other side ends in the middle of it.
    sys.excepthook = lambda kind, error, trace: (
        None if issubclass(kind, EOFError | ConnectionError) else sys.__excepthook__(kind, error, trace)
    )

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_fork_server() -> None:
    """Start the process that workers are forked from, unless it runs already.

    The signals are blocked while it starts, because a blocked signal stays blocked in its children.
    """
    _close_at_exit()
    resource_tracker.ensure_running()  # first, since starting it unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF_TO)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", *_PRELOADED])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Hold Ctrl-C back: workers that lose their parent while they start would say so at length."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _as_many_as_asked_for() -> Iterator[None]:
    """Workers may outnumber the cores without a remark of torch's: some wait for a disk most of the time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


@functools.cache
def _close_at_exit() -> None:
    """End all workers before multiprocessing's own exit handler, which asks with SIGTERM and waits."""
    atexit.register(_close_all)


def _close_all() -> None:
    for stream in list(_open_streams):
        stream.close()


def _end(iterator: Any) -> None:
    """Ask the workers behind a DataLoader's iterator to leave, and end those that don't."""
    workers = list(getattr(iterator, "_workers", ()))
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
    # The threads that wrote to the workers: one that let go of a queue's semaphore last, while this process ends,
    # may be stopped between its removal and telling so, which multiprocessing's tracker then complains of.
    for queue in getattr(iterator, "_index_queues", ()):
        if queue._thread is not None:
            queue._thread.join(_WRITER_ENDS_S)


class WorkerStream(Iterable[Batch]):
    """Batches of the keys that a sampler gives, by worker processes."""

    def __init__(
        self, samples: Samples, collate: Collate, keys: Iterable[list[Key]], workers: int, pin_memory: bool
    ) -> None:
        _start_fork_server()
        with _as_many_as_asked_for():
            self._loader: DataLoader[Any] = DataLoader(
                _Keyed(samples),
                batch_sampler=keys,
                collate_fn=_Collated(collate),
                num_workers=workers,
                pin_memory=pin_memory,
                # Without a generator of its own, every new iterator draws from the global one, and a
                # resumed run would no longer have the same random numbers as an unstopped one.
                generator=torch.Generator(),
                multiprocessing_context="forkserver",
                persistent_workers=True,
                worker_init_fn=_follow_parent,
            )
        self._end: Callable[[], object] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        with _interrupted_later(), _as_many_as_asked_for():
            iterator = iter(self._loader)  # the same one again where workers persist
            self._end = weakref.finalize(self, _end, iterator)
            _open_streams.add(self)
        return _as_said(iterator)

    def close(self) -> None:
        """End the workers; may be called twice."""
        self._end()
        self._loader._iterator = None


_open_streams: weakref.WeakSet[WorkerStream] = weakref.WeakSet()


def _as_said(batches: Iterator[Any]) -> Iterator[Batch]:
    """What a worker refused, without the traceback that torch puts around it."""
    try:
        yield from batches
    except ConfigError as error:
        raise ConfigError(str(error).rpartition("ConfigError: ")[2].strip()) from None


class HereStream(Iterable[Batch]):
    """The same by this process; DataLoader's own way of doing that takes longer than a small batch."""

    def __init__(self, samples: Samples, collate: Collate, keys: Iterable[list[Key]], pin_memory: bool) -> None:
        self._samples, self._collate, self._keys, self._pin_memory = samples, collate, keys, pin_memory

    def __iter__(self) -> Iterator[Batch]:
        keys = iter(self._keys)
        while True:
            # Between steps all this leaves the processor's caches: a few small batches cost hardly more than one.
            ready, failed, end = list[Batch](), None, time.perf_counter() + _TOGETHER_S
            for each in keys:
                try:
                    ready.append(self._batch(each))
                except Exception as error:  # for its turn, as if nothing were made ahead
                    failed = error
                    break
                if len(ready) == _TOGETHER or time.perf_counter() > end:
                    break
            yield from ready
            if failed is not None:
                raise failed
            if not ready:
                return

    def _batch(self, keys: list[Key]) -> Batch:
        batch = self._collate([self._samples[index] for index, _ in keys], [seed for _, seed in keys])
        return batch.pin_memory() if self._pin_memory else batch

    def close(self) -> None:
        """There is nothing to end."""


def open_stream(
    samples: Samples, collate: Collate, keys: Iterable[list[Key]], workers: int, pin_memory: bool = False
) -> WorkerStream | HereStream:
    """Batches of `keys`, in their order.

    Args:
        samples: what keys look up.
        collate: makes a batch of samples.
        keys: of one batch after another; read a little ahead.
        workers: processes; 0: this one.
        pin_memory: where there is an accelerator.
    """
    pin_memory = pin_memory and torch.accelerator.is_available()
    if workers:
        return WorkerStream(samples, collate, keys, workers, pin_memory)
    return HereStream(samples, collate, keys, pin_memory)
