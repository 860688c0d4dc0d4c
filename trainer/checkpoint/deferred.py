"""Tensors that are read from elsewhere only when a checkpoint is written, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor


@final
class Deferred(Tensor):
    """Shape and dtype of a tensor, without storage, and how to get its values when it is written."""

    _read: Callable[[], Tensor]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Asked by torch.distributed.checkpoint for what it is about to write."""
        return self._read()


@final
class OneByOne:
    """Makes tensors to be for one save, in one process; of all of them one has its values in memory at a time."""

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> Deferred:
        """A tensor to be.

        Args:
            shape: of what `read` gives.
            dtype: to write; what `read` gives is converted.
            read: called when its turn has come.
        """
        found = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Deferred)
        found._read = lambda: self._next(found, read)
        return found

    def _next(self, wanted: Deferred, read: Callable[[], Tensor]) -> Tensor:
        # torch keeps every tensor of a file until the file is closed, though it has written one before it asks for the
        # next.
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = torch.empty(wanted.shape, dtype=wanted.dtype)
        return self._last.copy_(read())
