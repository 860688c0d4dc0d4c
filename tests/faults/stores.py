"""A store that fails or dawdles, around any other."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO
from unittest import mock

from trainer.checkpoint import catalogue
from trainer.checkpoint.store import AbstractStore, HashedFile


class FaultyStore(AbstractStore):
    """Every `every`-th call raises, or takes `delay_s` longer.

    Args:
        store: does the work.
        every: 1: each call.
        error: number of the OSError to raise; None: no error.
        delay_s: seconds.
        methods: the ones that count; None: all.
    """

    def __init__(
        self,
        store: AbstractStore,
        *,
        every: int,
        error: int | None = errno.EIO,
        delay_s: float = 0.0,
        methods: Iterable[str] | None = None,
    ) -> None:
        self.address = store.address
        self._store, self._every, self._error, self._delay_s = store, every, error, delay_s
        self._methods = None if methods is None else set(methods)
        self._lock = threading.Lock()
        self.calls = 0
        self.struck = 0

    def sizes(self, below: str = "") -> dict[str, int]:
        self._count("sizes")
        return self._store.sizes(below)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._count("open")
        return self._store.open(name)

    def create(self, name: str) -> AbstractContextManager[HashedFile]:
        self._count("create")
        return self._store.create(name)

    def publish(self, name: str, data: bytes) -> None:
        self._count("publish")
        self._store.publish(name, data)

    def remove(self, names: Iterable[str]) -> None:
        self._count("remove")
        self._store.remove(names)

    def _count(self, method: str) -> None:
        if self._methods is not None and method not in self._methods:
            return
        with self._lock:
            self.calls += 1
            strikes = self.calls % self._every == 0
            self.struck += strikes
        if not strikes:
            return
        time.sleep(self._delay_s)
        if self._error is not None:
            raise OSError(self._error, os.strerror(self._error))


@contextlib.contextmanager
def faulty_stores(
    *, every: int, error: int | None = errno.EIO, delay_s: float = 0.0, methods: Iterable[str] | None = None
) -> Iterator[list[FaultyStore]]:
    """Checkpointers that are made inside use such stores; which are told."""
    made: list[FaultyStore] = []
    real = catalogue.open_store

    def open_store(address: str) -> AbstractStore:
        made.append(FaultyStore(real(address), every=every, error=error, delay_s=delay_s, methods=methods))
        return made[-1]

    with mock.patch.object(catalogue, "open_store", open_store):
        yield made


@contextlib.contextmanager
def own_disk(host: str) -> Iterator[None]:
    """The same checkpoint address leads to another folder on each `host`, as without a shared disk."""
    real = catalogue.open_store
    with mock.patch.object(catalogue, "open_store", lambda address: real(f"{address}-of-{host}")):
        yield
