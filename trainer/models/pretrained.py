"""Values of a stored `transformers` model, read part by part: no process ever holds the whole of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.initialise import bare

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def stream(model: nn.Module, folder: Path) -> bool:
    """Read the stored parameters and buffers into `model`, of each tensor what this rank holds.

    Args:
        model: with storage, sharded or not; with or without adapters of `peft`, which stay as they are.
        folder: of `save_pretrained`.

    Returns:
        False, and `model` is as before: there are no safetensors, or their names and shapes aren't the model's own
        (an older layout that transformers converts while it loads, a new head).
    """
    places = _places(folder)
    targets = _targets(model)
    if not places or not targets.keys() <= places.keys():
        return False
    from safetensors import safe_open

    files = {path: safe_open(path, framework="pt") for path in set(places.values())}
    if any(
        tuple(value.shape) != tuple(files[places[name]].get_slice(name).get_shape()) for name, value in targets.items()
    ):
        return False
    for name, value in targets.items():
        _read(value, files[places[name]].get_slice(name))
    return True


def _places(folder: Path) -> dict[str, Path]:
    """Name of each stored tensor -> its file."""
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        stored = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {str(name): folder / str(file) for name, file in stored.items()}
    if not (folder / _WHOLE).is_file():
        return {}
    with safe_open(folder / _WHOLE, framework="pt") as file:
        return {str(name): folder / _WHOLE for name in file.keys()}  # noqa: SIM118 - it is no dictionary


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Name in the file -> what it fills; tied weights once."""
    base: Any = bare(model)
    aliases = set(base.get_expanded_tied_weights_keys(all_submodels=True))
    found = {}
    for name, value in base.state_dict(keep_vars=True).items():
        plain = name.replace(".base_layer.", ".")
        if plain not in aliases and not any(part.startswith("lora_") for part in name.split(".")):
            found[plain] = value
    return found


@torch.no_grad()
def _read(target: Tensor, stored: Any) -> None:
    if not hasattr(target, "placements"):
        target.copy_(stored[:] if target.ndim else stored[...])
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(target, DTensor)
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if 0 in shape:
        return
    part = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
    target.to_local().copy_(stored[part])
