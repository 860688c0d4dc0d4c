"""Tensors in memory that outlives the program: the one that takes its place in the same process finds them again."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Kinds: TypeAlias = dict[str, list[Any]]
"""Of each tensor: the name of its dtype, then its shape."""

_HEAD = 64  # bytes, in which stands where the tensors end and the note begins; tensors begin at multiples of it


def kinds_of(tensors: Mapping[str, Tensor]) -> Kinds:
    """What `Memory.places` needs to know of them."""
    return {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}


class Memory:
    """A set of tensors and a note. What isn't complete, since it was broken off, isn't there.

    Args:
        number: of an open file in memory; None: a new one.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = os.memfd_create("commit") if number is None else number
        self._kinds: Kinds | None = None
        self._places: dict[str, Tensor] = {}
        self._end = _HEAD

    def places(self, kinds: Kinds) -> dict[str, Tensor]:
        """Tensors on CPU to write into; until then they hold what they held, and there is no note."""
        if kinds != self._kinds:
            self._map(kinds)
        os.ftruncate(self.number, self._end)
        return self._places

    def note(self, content: Any) -> None:
        """The tensors are written: JSON that says what they are."""
        os.pwrite(self.number, json.dumps([content, self._kinds]).encode(), self._end)

    def read(self) -> tuple[Any, dict[str, Tensor]] | None:
        """The note, and the tensors in place."""
        size = os.fstat(self.number).st_size
        end = int(os.pread(self.number, _HEAD, 0) or size)
        if size == end:
            return None
        content, kinds = json.loads(os.pread(self.number, size - end, end))
        self._map(kinds)
        return content, self._places

    def _map(self, kinds: Kinds) -> None:
        ends, places = _HEAD, {}
        for name, (dtype, *shape) in kinds.items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            places[name] = ends, empty
            ends += -(-empty.nbytes // _HEAD) * _HEAD
        if os.fstat(self.number).st_size < ends:
            os.ftruncate(self.number, ends)
        os.pwrite(self.number, f"{ends:{_HEAD}}".encode(), 0)
        mapped = mmap.mmap(self.number, ends)
        self._kinds, self._end = kinds, ends
        self._places = {
            name: torch.frombuffer(mapped, dtype=empty.dtype, count=empty.numel(), offset=begin).view(empty.shape)
            if empty.numel()
            else torch.empty(empty.shape, dtype=empty.dtype)
            for name, (begin, empty) in places.items()
        }
