"""DeepSpeed's own checkpoints: what its ZeRO optimizers cut flat, put together again one parameter at a time.

    global_step10/
        mp_rank_00_model_states.pt                     names, shapes, buffers, frozen weights, counters; stages 0 to 2
        zero_pp_rank_<r>_mp_rank_00_model_states.pt    the same per rank; stage 3
        [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt    a rank's part of the masters and moments

Stages 1 and 2 lay a group's parameters end to end and give each rank an equal piece of the whole. Stage 3 gives each
rank a piece of each parameter, and lays these end to end, in sub-groups. The format is DeepSpeed 0.19's; keys that
older ones lack have defaults.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError
from trainer.imports.files import load
from trainer.imports.source import Lazy, Slots, Source, lazy, slots_of

_MASTER = "fp32"
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_")


def read(folder: Path, ignored: Collection[str]) -> Source:
    """The checkpoint in `folder`.

    Raises:
        ConfigError: files are missing or can't be read safely, or it was cut in a way that isn't known here.
    """
    _refuse_other_cuts(folder)
    models = [load(path, ignored) for path in _by_rank(folder.glob("*_model_states.pt"))]
    model = models[0]
    _refuse_other_models(model, folder)
    found = Source(
        what=f"DeepSpeed {model.get('ds_version') or '(unknown version)'}",
        where=str(folder),
        ranks=int(model.get("dp_world_size") or 1),
        weights={name: lazy(value) for name, value in model["module"].items() if isinstance(value, Tensor)},
        step=int(model["global_steps"]) if model.get("global_steps") is not None else None,
        samples=int(model["global_samples"]) if model.get("global_samples") is not None else None,
    )
    parts = _by_rank(folder.glob("*zero_pp_rank_*_optim_states.pt"))
    if model.get("param_shapes"):
        _read_zero(found, models, [load(path, ignored)["optimizer_state_dict"] for path in parts])
    elif model.get("optimizer"):
        _read_unpartitioned(found, model["optimizer"])
    else:
        found.what += ", weights alone"
    return found


def _by_rank(paths: Iterable[Path]) -> list[Path]:
    """In the order of the ranks, which isn't that of their names."""

    def rank(path: Path) -> int:
        match = _RANK.search(path.name)
        return int(match.group(1)) if match else 0

    return sorted(paths, key=rank)


def _refuse_other_cuts(folder: Path) -> None:
    """Models that are spread over ranks in further ways."""
    for pattern, what in (
        ("*mp_rank_01_*", "tensor or pipeline parallelism (mp_rank_01)"),
        ("layer_*", "pipeline parallelism (layer_*)"),
        ("*expert_*", "a mixture of experts (expert_*)"),
        ("expp_rank_*", "a mixture of experts (expp_rank_*)"),
    ):
        if any(folder.glob(pattern)):
            raise ConfigError(
                f"import: {folder} was written under {what}, which isn't read. Only data parallelism and ZeRO are."
            )


def _refuse_other_models(model: Any, folder: Path) -> None:
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise ConfigError(
            f"import: the model states in {folder} hold no weights by name. Only whole models of DeepSpeed's own "
            "engine are read, not pipelines."
        )


# ZeRO, stages 1 to 3.


def _read_zero(found: Source, models: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> None:
    model, stage3 = models[0], bool(ranks) and "fp32_flat_groups" in ranks[0]
    count = max(_several(ranks[0].get("partition_count", len(ranks)))) if ranks else found.ranks
    if len(ranks) != count or (stage3 and len(models) != count):
        raise ConfigError(
            f"import: {found.where} has the parts of {len(ranks)} ranks of {count} (*_optim_states.pt). "
            "Copy all machines' files into one folder."
        )
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    found.ranks = count
    found.weights = {name: value for name, value in found.weights.items() if name in set(model["buffer_names"])}
    found.weights |= _frozen(models)
    if stage3:
        found.what += " ZeRO-3"
        cells = [_sub_groups(rank) for rank in ranks]
        flats = {slot: [[cell[slot] for cell in of_rank] for of_rank in cells] for slot in _flat_slots(cells)}
        group = {name: shape for group in shapes for name, shape in group.items()}
        _cut(found, group, flats, [0] * len(group), cells[0], shared=True)
    else:
        found.what += " ZeRO-1/2"
        for index, group in enumerate(shapes):
            cells = [[_partition(rank, index)] for rank in ranks]
            flats = {slot: [[cell[slot] for (cell,) in cells]] for slot in _flat_slots(cells)}
            paddings = ranks[0].get("param_alignment_paddings")
            _cut(found, group, flats, paddings[index] if paddings else [0] * len(group), cells[0], shared=False)
    for alias, name in (model.get("shared_params") or {}).items():
        if name in found.weights:
            found.weights[alias] = found.weights[name]
    found.scaler = _scale_of(ranks[0].get("loss_scaler"))


def _several(value: Any) -> list[int]:
    return [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]


def _frozen(models: list[dict[str, Any]]) -> dict[str, Lazy]:
    """Weights that no optimizer owns: whole, or a piece of each on every rank."""
    model = models[0]
    shapes = {name: tuple(shape) for name, shape in (model.get("frozen_param_shapes") or {}).items()}
    pieces = {name: [part["frozen_param_fragments"][name].flatten() for part in models] for name in shapes}
    if shapes:
        return {name: _joined(pieces[name], shape) for name, shape in shapes.items()}
    # Stage 1 doesn't name them: what is neither trained nor a buffer.
    named = {name for group in model["param_shapes"] for name in group} | set(model["buffer_names"])
    shared = set(model.get("shared_params") or {})
    rest = {name: value for name, value in model["module"].items() if name not in named | shared}
    return {name: lazy(value) for name, value in rest.items() if isinstance(value, Tensor)}


def _sub_groups(rank: dict[str, Any]) -> list[dict[str, Any]]:
    """Stage 3: a rank's masters and moments, sub-group by sub-group."""
    state = rank["optimizer_state_dict"]["state"]
    return [{**state.get(index, {}), _MASTER: flat} for index, flat in enumerate(rank["fp32_flat_groups"])]


def _partition(rank: dict[str, Any], index: int) -> dict[str, Any]:
    """Stages 1 and 2: a rank's masters and moments of a group."""
    base = rank["base_optimizer_state"]
    if isinstance(base, dict):
        cell, options = dict(base["state"].get(index, {})), base["param_groups"][index]
    else:  # with elastic checkpoints
        cell, options = dict(base[index]), {"step": rank.get("base_optimizer_state_step")}
    if cell and "step" not in cell and options.get("step") is not None:  # some optimizers count per group
        cell["step"] = options["step"]
    return {**cell, _MASTER: rank["single_partition_of_fp32_groups"][index]}


def _flat_slots(cells: list[list[dict[str, Any]]]) -> list[str]:
    """The slots that were cut as the masters were; the others are numbers."""
    return [slot for slot, value in cells[0][0].items() if isinstance(value, Tensor) and value.dim() > 0]


def _cut(
    found: Source,
    shapes: Mapping[str, tuple[int, ...]],
    flats: Mapping[str, Sequence[Sequence[Tensor]]],
    paddings: Sequence[int],
    cells: Sequence[Mapping[str, Any]],
    *,
    shared: bool,
) -> None:
    """Enter a group's parameters.

    Args:
        found: what is known so far.
        shapes: name and shape of each parameter, in their order.
        flats: slot -> rows of flat tensors; the tensors of a row lie end to end.
        paddings: numbers that follow each parameter and mean nothing.
        cells: one rank's entries; how often each was updated stands there.
        shared: each parameter is spread over all rows, evenly; else there is one row.
    """
    rows = len(flats[_MASTER])
    ends = [0]
    for cell in cells:
        ends.append(ends[-1] + cell[_MASTER].numel())
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        share = -(-math.prod(shape) // rows) if shared else math.prod(shape)
        taken: Slots = {slot: _taken(flat, at, share, shape) for slot, flat in flats.items()}
        found.weights[name] = taken.pop(_MASTER)
        # One row's tensors are the ranks', which count alike; several rows' are sub-groups, which count for themselves.
        cell = cells[max(index for index in range(len(cells)) if ends[index] <= at)] if shared else cells[0]
        counts = {slot: value for slot, value in cell.items() if slot not in flats}
        if taken:
            found.moments[name] = taken | slots_of(counts)
        at += share + padding
    for slot, flat in flats.items():
        for row in flat:
            if (held := sum(tensor.numel() for tensor in row)) < at or (shared and held != at):
                raise ConfigError(
                    f"import: the parts of {slot!r} in {found.where} have {held:,} numbers, and its parameters {at:,}. "
                    "Is it whole, and was nothing kept on NVMe?"
                )


def _taken(rows: Sequence[Sequence[Tensor]], begin: int, length: int, shape: tuple[int, ...]) -> Lazy:
    """The same stretch of each row, joined."""

    def read() -> Tensor:
        pieces = [piece for row in rows for piece in _stretch(row, begin, length)]
        return torch.cat(pieces)[: math.prod(shape)].view(shape)

    return Lazy(shape=shape, read=read)


def _stretch(row: Sequence[Tensor], begin: int, length: int) -> list[Tensor]:
    pieces: list[Tensor] = []
    for tensor in row:
        first, last = max(begin, 0), min(begin + length, tensor.numel())
        if first < last:
            pieces.append(tensor.flatten()[first:last])
        begin -= tensor.numel()
    return pieces


def _joined(pieces: Sequence[Tensor], shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape=shape, read=lambda: torch.cat(list(pieces))[: math.prod(shape)].view(shape))


def _scale_of(scaler: Any) -> dict[str, float]:
    """The loss scale, from what the file says of the object that kept it."""
    return _scale({} if scaler is None else getattr(scaler, "state", {}))


def _scale(kept: Mapping[str, Any]) -> dict[str, float]:
    window = kept.get("scale_window")
    if not window or not kept.get("cur_scale"):  # none, or one that doesn't change
        return {}
    steps = int(kept["cur_iter"]) - int(kept["last_overflow_iter"]) - 1
    return {"scale": float(kept["cur_scale"]), "growth_tracker": float(steps % int(window))}


# Stage 0.


def _read_unpartitioned(found: Source, optimizer: dict[str, Any]) -> None:
    """Every rank had all of it; moments have numbers instead of names."""
    found.what += " stage 0"
    if "fp32_groups_flat" in optimizer:
        raise ConfigError(
            f"import: {found.where} has flat masters of stage 0 with a fused optimizer, which aren't read. "
            "Save once more with ZeRO stage 1."
        )
    masters = optimizer.get("fp32_groups")
    state = optimizer.get("optimizer_state_dict", optimizer)
    found.groups = [[slots_of(state["state"].get(n, {})) for n in group["params"]] for group in state["param_groups"]]
    if masters is not None:
        for group, copies in zip(found.groups, masters, strict=True):
            for slots, copy in zip(group, copies, strict=True):
                slots[_MASTER] = lazy(copy)
    found.scaler = _scale(optimizer)
