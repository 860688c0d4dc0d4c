"""Reading torch.distributed.checkpoint's pickled `.metadata` without letting it run code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from strategies.errors import ConfigError

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
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a checkpoint's index is made of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class IndexReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with an index that can't run code.

    Raises:
        ConfigError: the index is missing, damaged, or names something foreign.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(index.read_bytes())).load()
        except Exception as error:
            raise ConfigError(
                f"Checkpoint: {index} can't be read: {error}. "
                "Remove that checkpoint's folder, or name another (resume)."
            ) from error
        if not isinstance(metadata, Metadata):
            raise ConfigError(
                f"Checkpoint: {index} isn't an index. Remove that checkpoint's folder, or name another (resume)."
            )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
