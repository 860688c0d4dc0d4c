"""torch.distributed.checkpoint over a store: files that are hashed as they are written, an index that runs no code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from strategies.errors import ConfigError
from trainer.checkpoint.store import AbstractStore

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a checkpoint's index is made of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _Files(FileSystemBase):
    """A store, as torch's reader and writer see it. Notes size and SHA-256 of what is written."""

    def __init__(self, store: AbstractStore) -> None:
        self._store = store
        self._renamed: dict[str, bytes] = {}
        self.written: dict[str, tuple[int, str]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        name = str(path)
        if mode == "rb":
            with self._store.open(name) as stream:
                yield cast(io.IOBase, stream)
        elif name.endswith(".tmp"):  # to be renamed, which an object store can't
            memory = io.BytesIO()
            yield memory
            self._renamed[name] = memory.getvalue()
        else:
            with self._store.create(name) as file:
                yield file
            self.written[name] = (file.size, file.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with self.create_stream(new_path, "wb") as stream:
            cast(io.BytesIO, stream).write(self._renamed.pop(str(path)))

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


class StoreWriter(FileSystemWriter):
    """Writes this rank's tensors below `folder`."""

    def __init__(self, store: AbstractStore, folder: str) -> None:
        super().__init__(folder, sync_files=False)  # the store makes what it closes durable
        self.fs = files = _Files(store)  # type: ignore[assignment]
        self.path = folder
        self.written = files.written
        """Name in the store -> bytes and SHA-256, of this rank's files."""


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

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
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
