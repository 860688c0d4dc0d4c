"""Accelerate's `save_state`: whole files under DDP, folders of torch.distributed.checkpoint under FSDP.

    model.safetensors | pytorch_model.bin | pytorch_model_fsdp.bin | pytorch_model_fsdp_0/
    optimizer.bin | optimizer_0/
    scaler.pt

The Trainer of transformers, which is built on Accelerate, writes the same with `optimizer.pt` and `trainer_state.json`.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from strategies.errors import ConfigError
from trainer.imports.files import load
from trainer.imports.source import Lazy, Source, lazy, slots_of

if TYPE_CHECKING:
    from trainer.checkpoint.metadata import IndexReader


def read(folder: Path, ignored: Collection[str]) -> Source | None:
    """The checkpoint in `folder`; None: there is none of Accelerate's.

    Raises:
        ConfigError: it can't be read, safely or at all; or it holds several models.
    """
    _refuse_others(folder)
    ranks = max(1, len(list(folder.glob("random_states_*.pkl"))))
    found = Source(what="Accelerate", where=str(folder), ranks=ranks, weights={})
    if (folder / "pytorch_model_fsdp_0" / ".metadata").is_file():
        found.what += " FSDP, sharded"
        found.weights = _dcp(folder / "pytorch_model_fsdp_0", "model")
    elif files := [*folder.glob("model.safetensors"), *sorted(folder.glob("model-*-of-*.safetensors"))]:
        found.weights = {name: value for path in files for name, value in _safetensors(path).items()}
    elif files := [
        folder / name for name in ("pytorch_model.bin", "pytorch_model_fsdp.bin") if (folder / name).is_file()
    ]:
        held = load(files[0], ignored)
        found.weights = {name: lazy(value) for name, value in held.items() if isinstance(value, Tensor)}
    else:
        return None
    if (folder / "optimizer_0" / ".metadata").is_file():
        for key, value in _dcp(folder / "optimizer_0", "optimizer.state").items():
            name, _, slot = key.rpartition(".")
            found.moments.setdefault(name, {})[slot] = value
    elif files := [folder / name for name in ("optimizer.bin", "optimizer.pt") if (folder / name).is_file()]:
        _read_optimizer(found, load(files[0], ignored))
    if (folder / "trainer_state.json").is_file():
        found.what, found.step = "Trainer of transformers", _step_of(folder / "trainer_state.json")
    if (folder / "scaler.pt").is_file() and (scaler := load(folder / "scaler.pt", ignored)):
        found.scaler = {"scale": float(scaler["scale"]), "growth_tracker": float(scaler["_growth_tracker"])}
    return found


def _step_of(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["global_step"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"import: {path} doesn't tell its step: {error}. It must be whole.") from error


def _refuse_others(folder: Path) -> None:
    for pattern, what in (
        ("model_1.*", "two models"),
        ("pytorch_model_1.bin", "two models"),
        ("pytorch_model_fsdp_1", "two models"),
        ("optimizer_1.bin", "two optimizers"),
        ("optimizer_1", "two optimizers"),
        ("*_rank0.bin", "files per rank (LOCAL_STATE_DICT, or use_dcp=False)"),
    ):
        if any(folder.glob(pattern)):
            raise ConfigError(
                f"import: {folder} holds {what}, which isn't read. One model and one optimizer are, saved with "
                "SHARDED_STATE_DICT or FULL_STATE_DICT under FSDP."
            )


def _read_optimizer(found: Source, state: dict[str, Any]) -> None:
    """torch's own form: parameters by number, or by name where FSDP wrote it whole."""
    entries, groups = state["state"], state["param_groups"]
    if all("param_names" in group for group in groups):  # it was made from named parameters
        entries = {
            name: entries[number]
            for group in groups
            for number, name in zip(group["params"], group["param_names"], strict=True)
            if number in entries
        }
    if all(isinstance(key, str) for key in entries) and entries:
        found.moments = {name: slots for name, entry in entries.items() if (slots := slots_of(entry))}
    else:
        found.groups = [[slots_of(entries.get(number, {})) for number in group["params"]] for group in groups]


def _safetensors(path: Path) -> dict[str, Lazy]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"import: {path} can't be read: {str(error).splitlines()[0]}. It must be whole.") from error
    return {name: Lazy(shape=shape, read=functools.partial(file.get_tensor, name)) for name, shape in shapes.items()}


def _dcp(folder: Path, prefix: str) -> dict[str, Lazy]:
    """The tensors below `prefix` of a folder of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from trainer.checkpoint.metadata import IndexReader
    from trainer.checkpoint.store import FolderStore

    reader = IndexReader(FolderStore(folder.parent), folder.name)
    try:
        index = reader.read_metadata()
    except ConfigError as error:
        raise ConfigError(
            f"import: {folder} can't be read: {error.__cause__ or error}. It must be whole, and written by "
            "torch.distributed.checkpoint."
        ) from error
    found = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and key.startswith(f"{prefix}."):
            shape = tuple(entry.size)
            read = functools.partial(_read_dcp, reader, key, shape, entry.properties.dtype)
            found[key.removeprefix(f"{prefix}.")] = Lazy(shape=shape, read=read)
    return found


def _read_dcp(reader: IndexReader, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        reader.read({key: tensor})
    return tensor
