"""torch.distributed.checkpoint over a store: files that are hashed as they are written, an index that runs no code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemBase,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from strategies.errors import ConfigError
from trainer.checkpoint.store import AbstractStore

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
"""Where torch's own writer was told to write: as a path that touches no disk."""


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a checkpoint's index is made of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _Files(FileSystemBase):
    """A store, as torch's reader and writer see it. Notes size and SHA-256 of what is written."""

    def __init__(self, store: AbstractStore) -> None:
        self._store = store
        self.written: dict[str, tuple[int, str]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        name = str(path)
        if mode == "rb":
            with self._store.open(name) as stream:
                yield cast(io.IOBase, stream)
        else:
            with self._store.create(name) as file:
                yield file
            self.written[name] = (file.size, file.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        raise NotImplementedError("a store doesn't rename")

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return str(path) in self.written  # a folder of its own for every attempt

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """A store makes its folders as it needs them."""

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._store.remove([str(path)])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


IndexPart = dict[str, dict[str, Any]]
"""Tensor name -> dtype, size, and chunks of [offsets, sizes, file, byte offset, byte length]. Plain JSON."""


class _OwnPart(DefaultSavePlanner):
    """Plans what one rank writes, without a look at the others."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata


class StoreWriter(FileSystemWriter):
    """Writes one rank's part of the tensors below `folder`, and keeps the index of it for `publish_index`.

    Ranks don't talk to each other here: torch's own planning would send pickles between them.
    """

    def __init__(self, store: AbstractStore, folder: str, rank: int) -> None:
        super().__init__(folder, sync_files=False)  # the store makes what it closes durable
        self.fs = files = _Files(store)  # type: ignore[assignment]
        self.path = folder
        self._prefix = f"__{rank}_"
        self.written = files.written
        """Name in the store -> bytes and SHA-256, of this rank's files."""
        self.index: IndexPart = {}

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write `tensors`: whole ones, and the local shards of others."""
        with _bare_errors():
            dcp.save(tensors, storage_writer=self, planner=_OwnPart(), no_dist=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=_StoragePrefix(self._prefix)) for plan in plans]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {found.index: found.storage_data for part in results for found in part}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [(chunk, places[MetadataIndex(name, chunk.offsets)]) for chunk in entry.chunks]
            self.index[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "size": list(entry.size),
                "chunks": [
                    [list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length]
                    for chunk, place in chunks
                ],
            }


def index_of(parts: Iterable[IndexPart]) -> bytes:
    """torch's `.metadata` of all ranks' parts together, so that its own tools can read the checkpoint too.

    Raises:
        ValueError: the parts of some tensor don't make up the whole.
    """
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        for name, told in part.items():
            entry = entries.setdefault(
                name,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=getattr(torch, told["dtype"])),
                    size=torch.Size(told["size"]),
                    chunks=[],
                ),
            )
            for offsets, sizes, *place in told["chunks"]:
                places[MetadataIndex(name, offsets, len(entry.chunks))] = _StorageInfo(*place)
                entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
    for name, entry in entries.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"the parts of {name!r} that the ranks wrote don't make up the whole")
    return pickle.dumps(
        Metadata(
            state_dict_metadata=entries,
            planner_data={name: (name,) for name in entries},
            storage_data=places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
    )


class IndexReader(FileSystemReader):
    """torch's reader of a checkpoint's tensors, with an index that can't run code.

    Raises:
        ConfigError: the index is missing, damaged, or names something foreign.
    """

    def __init__(self, store: AbstractStore, folder: str) -> None:
        super().__init__(folder)
        self.fs = _Files(store)  # type: ignore[assignment]
        self.path = folder
        self._where = f"{store.address}/{folder}/.metadata"
        self._read: Metadata | None = None

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Read into `tensors`, in place."""
        with _bare_errors():
            dcp.load(dict(tensors), storage_reader=self, no_dist=True)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is None:
            self._read = self._index()
        return self._read

    def _index(self) -> Metadata:
        try:
            with self.fs.create_stream(f"{self.path}/.metadata", "rb") as stream:
                metadata = _Unpickler(stream).load()
        except Exception as error:
            raise ConfigError(
                f"Checkpoint: {self._where} can't be read: {error}. "
                "Remove that checkpoint's folder, or name another (resume)."
            ) from error
        if not isinstance(metadata, Metadata):
            raise ConfigError(
                f"Checkpoint: {self._where} isn't an index. Remove that checkpoint's folder, or name another (resume)."
            )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextlib.contextmanager
def _bare_errors() -> Iterator[None]:
    """What went wrong itself; torch wraps it, with its traceback, in something that isn't an `Exception`."""
    try:
        yield
    except CheckpointException as error:
        found = next(iter(error.failures.values()))[0]
        # Of a full disk torch tells only what came of it, while it handled the error that counts.
        raise (found.__context__ if isinstance(found.__context__, OSError) else found) from None
