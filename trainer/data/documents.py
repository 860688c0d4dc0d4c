"""Tokenised documents on disk, memory-mapped: written once, front to back, and read at random.

A document is its boundary token and its tokens. Documents lie in one stream, closed by one more
boundary token, so that every document is followed by the token that ends it.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainer.data.base import Tokens


@final
class ArrayFile:
    """A one-dimensional array in a file, opened where it is first read (also after pickling)."""

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        """Name it.

        Args:
            path: of a `.npy` file; with `dtype`, of a file of nothing but numbers.
            dtype: of the numbers in a raw file.
        """
        self._path, self._dtype = path, dtype

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_dtype": self._dtype}

    @functools.cached_property
    def values(self) -> NDArray[Any]:
        """The whole array, mapped."""
        if self._dtype is not None:
            found: NDArray[Any] = np.memmap(self._path, dtype=self._dtype, mode="r")
        else:
            found = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return np.asarray(found)  # a part of a plain array is made in a tenth of the time


@final
class TokenArray:
    """Token files read as one stream, from `start` to `stop`."""

    def __init__(self, files: Sequence[ArrayFile], start: int = 0, stop: int | None = None) -> None:
        self._files = list(files)
        self._starts = list(itertools.accumulate((len(file.values) for file in files), initial=0))
        self._start = start
        self._stop = self._starts[-1] if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens `start` .. `stop` - 1; fewer at the end of the stream."""
        start, stop = start + self._start, min(stop + self._start, self._stop)
        first = bisect_right(self._starts, start) - 1
        last = bisect_right(self._starts, max(start, stop - 1)) - 1
        parts = []
        for number in range(first, last + 1):
            offset = self._starts[number]
            parts.append(self._files[number].values[max(0, start - offset) : max(0, stop - offset)])
        return np.concatenate(parts).astype(np.int64) if len(parts) > 1 else np.array(parts[0], dtype=np.int64)

    def part(self, start: int, stop: int) -> TokenArray:
        """The same stream, narrowed."""
        return TokenArray(self._files, self._start + start, self._start + stop)


@final
class Documents:
    """One side of a data set: its token stream, where documents start, and what belongs to each."""

    def __init__(
        self,
        tokens: TokenArray,
        offsets: ArrayFile | None = None,
        counts: TokenArray | None = None,
        labels: ArrayFile | None = None,
        sources: TokenArray | None = None,
        source_offsets: ArrayFile | None = None,
        skip: int = 0,
        num_documents: int | None = None,
    ) -> None:
        """Bring the parts together.

        Args:
            tokens: the stream.
            offsets: int64 [documents + 1], where each document starts, and the end of the last one;
                None: they aren't known.
            counts: whether each token is a target; None: all are.
            labels: int64 [documents], classes.
            sources: what an encoder reads, document after document.
            source_offsets: int64 [documents + 1] into `sources`.
            skip: documents in `offsets` that lie before the stream's start.
            num_documents: documents in the stream; None: all from `skip` on.
        """
        self.tokens = tokens
        self.counts = counts
        self._offsets, self._skip = offsets, skip
        self._labels, self._sources, self._source_offsets = labels, sources, source_offsets
        total = 0 if offsets is None else len(offsets.values) - 1
        self._num_documents = total - skip if num_documents is None else num_documents

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """What a `DocumentWriter` left."""

        def file(name: str) -> ArrayFile | None:
            return ArrayFile(folder / name) if (folder / name).exists() else None

        def stream(name: str) -> TokenArray | None:
            found = file(name)
            return None if found is None else TokenArray([found])

        return cls(
            tokens=TokenArray([ArrayFile(folder / "tokens.npy")]),
            offsets=file("offsets.npy"),
            counts=stream("counts.npy"),
            labels=file("labels.npy"),
            sources=stream("sources.npy"),
            source_offsets=file("source_offsets.npy"),
        )

    def __len__(self) -> int:
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document starts in the stream, and the end of the last one; mapped unless cut."""
        assert self._offsets is not None, "documents aren't known"
        found: NDArray[np.int64] = self._offsets.values[self._skip : self._skip + len(self) + 1]
        return found - found[0] if self._skip else found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "starts"}

    def numbers(self, start: int, stop: int) -> NDArray[np.int32]:
        """The document that each token of a stretch is from, counted from the stretch's first one."""
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        found = np.zeros(stop - start, dtype=np.int32)
        found[self.starts[first + 1 : last + 1] - start] = 1
        return np.cumsum(found, dtype=np.int32)

    def label(self, document: int) -> int | None:
        """The class of a document, if the data has classes."""
        return None if self._labels is None else int(self._labels.values[document])

    def source(self, document: int) -> Tokens | None:
        """What an encoder reads for a document, if the data has that."""
        if self._sources is None or self._source_offsets is None:
            return None
        start, stop = self._source_offsets.values[document : document + 2]
        return self._sources.read(int(start), int(stop))


class _Column:
    """A `.npy` file that grows."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads the header for the growth of the first axis, so that it can be written over.
        self._file.seek(0)
        description = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": description, "fortran_order": False, "shape": (self._length,)}
        )

    def write(self, values: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._length += len(values)

    def close(self) -> None:
        self._write_header()
        self._file.close()

    def abandon(self) -> None:
        self._file.close()


@final
class DocumentWriter:
    """Writes documents one after another into a folder that `Documents.open` reads."""

    def __init__(self, folder: Path, boundary: int, vocabulary_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._boundary = folder, boundary
        self._dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.uint32
        self._columns: dict[str, _Column] = {}
        self._offsets, self._source_offsets, self._labels = array("q", [0]), array("q", [0]), array("q")

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add(
        self,
        tokens: Tokens,
        counts: NDArray[np.bool_] | None = None,
        label: int | None = None,
        source: Tokens | None = None,
    ) -> None:
        """Append one document; all documents of a folder have the same optional parts.

        Args:
            tokens: [n], without boundary.
            counts: [n].
            label: its class.
            source: [m], what an encoder reads, complete.
        """
        self._column("tokens", self._dtype).write(np.concatenate([[self._boundary], tokens]))
        self._offsets.append(self._offsets[-1] + len(tokens) + 1)
        if counts is not None:
            self._column("counts", np.bool_).write(np.concatenate([[False], counts]))
        if label is not None:
            self._labels.append(label)
        if source is not None:
            self._column("sources", self._dtype).write(source)
            self._source_offsets.append(self._source_offsets[-1] + len(source))

    def renumber_labels(self, numbers: Sequence[int]) -> None:
        """Replace each label by `numbers[label]`."""
        self._labels = array("q", (numbers[label] for label in self._labels))

    def _column(self, name: str, dtype: DTypeLike) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(self._folder / f"{name}.npy", dtype)
        return self._columns[name]

    def close(self) -> None:
        """Write the closing boundary and everything but the tokens."""
        self._column("tokens", self._dtype).write(np.array([self._boundary]))
        if "counts" in self._columns:
            self._columns["counts"].write(np.array([False]))
        for column in self._columns.values():
            column.close()
        np.save(self._folder / "offsets.npy", np.array(self._offsets, dtype=np.int64))
        if self._labels:
            np.save(self._folder / "labels.npy", np.array(self._labels, dtype=np.int64))
        if "sources" in self._columns:
            np.save(self._folder / "source_offsets.npy", np.array(self._source_offsets, dtype=np.int64))

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            for column in self._columns.values():
                column.abandon()
