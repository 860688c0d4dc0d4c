"""From documents to samples of a fixed length: three ways, each cheap enough to read at random."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from trainer.data.base import Sample, Samples
from trainer.data.documents import ArrayFile, Documents

Stretches: TypeAlias = Sequence[tuple[int, int]]
"""(start, size) in the token stream."""


class Packing(Enum):
    """How documents become samples."""

    windows = "windows"
    """One stream of all documents, cut every `length` tokens."""
    whole = "whole"
    """Whole documents packed together up to `length` tokens; only longer ones are cut."""
    none = "none"
    """One document per sample, its end cut off beyond `length` tokens."""


_OPEN_SAMPLES = 64
"""How many unfilled samples a document may still go into, which bounds the search and the disorder."""


def _assemble(documents: Documents, stretches: Stretches, isolate: bool) -> Sample:
    """A sample of one or more stretches of the stream, and the token that follows the last one.

    Every token of the stretches is an input once, and its target is the token after it; after the
    end of a document that is a boundary, whichever document comes next.
    """
    last_start, last_size = stretches[-1]
    spans = [(start, start + size) for start, size in stretches[:-1]] + [(last_start, last_start + last_size + 1)]
    parts = [documents.tokens.read(start, stop) for start, stop in spans]
    sample: dict[str, Any] = {"tokens": np.concatenate(parts) if len(parts) > 1 else parts[0]}
    if documents.counts is not None:
        sample["counts"] = np.concatenate([documents.counts.read(start, stop) for start, stop in spans]).astype(bool)
    if isolate:
        read = [(start, start + len(part)) for (start, _), part in zip(spans, parts, strict=True)]
        numbers = _numbers(documents, read)
        if len(numbers) > 1 and numbers[-2]:  # the last token is a target only
            sample["documents"] = numbers
    return sample


def _numbers(documents: Documents, spans: Stretches) -> NDArray[np.int32]:
    found: list[NDArray[np.int32]] = []
    following = 0
    for start, stop in spans:
        found.append(documents.numbers(start, stop) + np.int32(following))
        following = int(found[-1][-1]) + 1
    return np.concatenate(found)


@final
class WindowSamples:
    """Windows of `length` + 1 tokens that overlap by one, so that each token is a target once.

    Only the stream's first token is no target, and the last window may be shorter.
    """

    def __init__(self, documents: Documents, length: int, isolate: bool) -> None:
        self._documents, self._length, self._isolate = documents, length, isolate

    def __len__(self) -> int:
        return max(0, -(-(self._documents.num_tokens - 1) // self._length))

    def __getitem__(self, index: int) -> Sample:
        start = _checked(index, len(self)) * self._length
        size = min(self._length, self._documents.num_tokens - 1 - start)
        return _assemble(self._documents, [(start, size)], self._isolate)


@final
class PackedSamples:
    """Whole documents packed together, as `plan_packing` arranged them."""

    def __init__(self, documents: Documents, plan: Path, isolate: bool) -> None:
        self._documents, self._isolate = documents, isolate
        self._stretches = ArrayFile(plan / "stretches.npy")
        self._samples = ArrayFile(plan / "samples.npy")

    def __len__(self) -> int:
        return len(self._samples.values) - 1

    def __getitem__(self, index: int) -> Sample:
        index = _checked(index, len(self))
        first, last = (int(value) for value in self._samples.values[index : index + 2])
        stretches = [(int(start), int(size)) for start, size in self._stretches.values[first:last]]
        return _assemble(self._documents, stretches, self._isolate)


@final
class DocumentSamples:
    """One document per sample, with its class or the text that it answers, where there is one."""

    def __init__(self, documents: Documents, length: int, source_length: int) -> None:
        self._documents, self._length, self._source_length = documents, length, source_length

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Sample:
        index = _checked(index, len(self))
        start, stop = (int(value) for value in self._documents.starts[index : index + 2])
        sample = _assemble(self._documents, [(start, min(stop - start, self._length))], False)
        label, source = self._documents.label(index), self._documents.source(index)
        if label is not None:
            sample["tokens"] = sample["tokens"][: self._length]
            sample["label"] = label
        if source is not None:
            sample["source_tokens"] = source[: self._source_length]
        return sample


@final
class JoinedSamples:
    """Several lists of samples, one after another."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        index = _checked(index, len(self))
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def _checked(index: int, length: int) -> int:
    """`index` as a number that ends `for` loops and refuses what lies outside."""
    if not 0 <= index < length:
        raise IndexError(f"sample {index} of {length}")
    return int(index)


def plan_packing(documents: Documents, length: int, folder: Path) -> None:
    """Arrange documents into samples of at most `length` tokens, first fit in their order.

    Longer documents are cut every `length` tokens. Written into `folder` for `PackedSamples`:
    `stretches.npy`, int64 [n, 2] (start, size), and `samples.npy`, int64 [samples + 1], offsets
    into it.
    """
    starts = documents.starts
    rooms = np.zeros(0, dtype=np.int64)
    unfilled: list[list[tuple[int, int]]] = []
    filled: list[list[tuple[int, int]]] = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        whole = stop - start < length
        while stop - start >= length:
            filled.append([(start, length)])
            start += length
        size = stop - start
        if not size:
            continue
        # The rest of a cut document begins without a boundary, and so can't follow another document.
        fits = np.flatnonzero(rooms >= size)
        if whole and len(fits):
            place = int(fits[0])
            unfilled[place].append((start, size))
            rooms[place] -= size
        else:
            if len(unfilled) == _OPEN_SAMPLES:
                fullest = int(rooms.argmin())
                filled.append(unfilled.pop(fullest))
                rooms = np.delete(rooms, fullest)
            unfilled.append([(start, size)])
            rooms = np.append(rooms, length - size)
    filled += unfilled
    stretches = [stretch for sample in filled for stretch in sample]
    np.save(folder / "stretches.npy", np.array(stretches, dtype=np.int64).reshape(-1, 2))
    np.save(folder / "samples.npy", np.cumsum([0, *(len(sample) for sample in filled)], dtype=np.int64))
