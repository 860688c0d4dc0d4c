"""A model for use on one machine, over what that has: GPUs, then host memory, then disk. Through Accelerate."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.models.library import quiet

_SPARE = 0.1
"""Of what is free on a device: for activations, and what was read of the text."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])(i?)B")

Places = Mapping[str, int | str]
"""Module -> number of a GPU, `cpu` or `disk`; the whole model is the module ''."""


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without storage for its parameters.

    Buffers are computed: those that aren't stored, such as rotary frequencies, come from nowhere else.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), init_empty_weights(include_buffers=False):
        return build()


def limits(asked: Sequence[str]) -> dict[int | str, int]:
    """The most bytes of weights on each device.

    Args:
        asked: such as `0=10GB` (the first GPU) or `cpu=500MiB`; the others have nine tenths of what is free now.

    Raises:
        ConfigError: there is no such device, or it isn't a size.
    """
    from accelerate.utils import get_max_memory

    found = {device: int(free * (1 - _SPARE)) for device, free in get_max_memory().items()}
    for word in asked:
        name, _, size = word.partition("=")
        device: int | str = int(name) if name.isdecimal() else name
        if device not in found:
            raise ConfigError(
                f"--max-memory={word}: this machine has no device {name!r}. "
                f"Choices: {', '.join(map(str, found))} (--max-memory)."
            )
        if (match := _SIZE.fullmatch(size)) is None:
            raise ConfigError(
                f"--max-memory={word}: {size!r} is not a size. Give one such as {name}=10GB or {name}=500MiB "
                "(--max-memory)."
            )
        number, unit, binary = match.groups()
        found[device] = int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit)))
    return found


def places(model: Any, most: Mapping[int | str, int], dtype: torch.dtype | None) -> Places:
    """Where each part of `model` is to lie; blocks stay whole, and each device is filled before the next.

    Args:
        model: on the meta device.
        most: bytes on each device, as `limits` gives them; what is left over goes to disk.
        dtype: in which the weights are to be held; None: the model's own.
    """
    from accelerate import infer_auto_device_map

    with _silent():
        found: Places = infer_auto_device_map(
            model,
            dict(most),
            no_split_module_classes=list(getattr(model, "_no_split_modules", None) or ()),
            dtype=dtype,
        )
    return found


def dispatch(
    model: Any, values: Iterable[tuple[str, Tensor]], where: Places, folder: Path, dtype: torch.dtype | None
) -> None:
    """Fill `model`, one tensor after another, and have each part computed where that is fastest.

    Parts on disk, and those in host memory beside a GPU, are brought to the first GPU (or to host memory) for as long
    as they compute.

    Args:
        model: of `empty`.
        values: name -> tensor on CPU; a tied weight once, under any of its names.
        where: as `places` gives it.
        folder: for what lies on disk; exists, and is there as long as the model is used.
        dtype: of floating-point parameters; None: the model's own.

    Raises:
        ConfigError: the disk is full.
    """
    from accelerate import dispatch_model
    from accelerate.utils import find_tied_parameters, offload_weight, retie_parameters, save_offload_index
    from accelerate.utils import set_module_tensor_to_device as put

    tied = find_tied_parameters(model)
    names = {name: group for group in tied for name in group}
    own = dict(model.named_parameters(remove_duplicate=False))
    index: dict[str, Any] = {}
    room = shutil.disk_usage(folder).free
    for name, value in values:
        wanted = own[name].dtype if name in own else value.dtype
        if dtype is not None and name in own and wanted.is_floating_point:
            wanted = dtype
        for each in names.get(name, [name]):
            place = place_of(each, where)
            if place != "disk":
                put(model, each, place, value=value, dtype=wanted)
                break  # the others are tied to it again below
            if (room := room - value.numel() * wanted.itemsize) < 0:
                raise ConfigError(
                    f"Model: what host memory can't hold doesn't fit on the disk of {folder}. Give a folder with more "
                    "room (--offload-folder)."
                )
            offload_weight(value.to(wanted), each, folder, index)
    save_offload_index(index, folder)
    retie_parameters(model, tied)
    on_disk = "disk" in where.values()
    with _silent():
        dispatch_model(model, dict(where), main_device=main_device(where), offload_dir=folder, force_hooks=on_disk)


def main_device(where: Places) -> int | str:
    """Where the model wants its input, and computes what lies in memory or on disk."""
    return next((device for device in where.values() if device not in ("cpu", "disk")), "cpu")


def place_of(name: str, where: Places) -> int | str:
    """The place of the innermost module around the parameter `name` that has one."""
    while name and name not in where:
        name = name.rpartition(".")[0]
    return where[name]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Accelerate tells what it does as warnings."""
    log = logging.getLogger("accelerate")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        log.setLevel(level)
