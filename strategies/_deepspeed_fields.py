"""What the fields of `DeepSpeedStrategy` may say, and what DeepSpeed calls it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from enum import Enum
from typing import Any

from strategies._nvme import Place
from strategies.errors import ConfigError


class Offload(Enum):
    """Where something lies while nobody computes with it."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


SUB_GROUP = 100_000_000
"""Numbers that are stepped at a time where they lie on NVMe and nobody says otherwise."""


def said(it: Any, near: int) -> dict[str, Any]:
    """Those fields that somebody set, as `zero_optimization` has them.

    Args:
        it: the `DeepSpeedStrategy`.
        near: ranks that share the second copy of the weights; 1: there is none.
    """
    path = {} if it.nvme_path is None else {"nvme_path": it.nvme_path}
    offload = {
        Offload.none: None,
        Offload.cpu: {"device": "cpu"},
        Offload.nvme: {"device": "nvme", **path},
    }
    found = {
        "reduce_bucket_size": numbers(it.bucket_mb),
        "allgather_bucket_size": numbers(it.bucket_mb),
        "overlap_comm": it.overlap,
        "stage3_param_persistence_threshold": it.persist_numbers,
        "stage3_prefetch_bucket_size": numbers(it.prefetch_mb),
        "sub_group_size": it.sub_group_numbers,
        "offload_optimizer": offload[it.offload_optimizer],
        "offload_param": offload[it.offload_parameters],
        "zero_hpz_partition_size": near if near > 1 else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def on_nvme(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Place | None, list[str]]:
    """What lies on NVMe by our own means (`NVMe`), and to DeepSpeed in host memory.

    Args:
        settings: for `deepspeed.initialize`.

    Returns:
        The settings as DeepSpeed gets them; folders on NVMe; and those keys that tune DeepSpeed's own way to the
        disk, which nobody goes.

    Raises:
        ConfigError: weights are to lie there, and masters and moments aren't.
    """
    zero = dict(settings["zero_optimization"])
    asked = {name: zero.get(name) or {} for name in ("offload_optimizer", "offload_param")}
    asked = {name: part for name, part in asked.items() if part.get("device") == "nvme"}
    if not asked:
        return dict(settings), None, []
    if "offload_optimizer" not in asked:
        raise ConfigError(
            "ds_config: zero_optimization.offload_param.device=nvme, and offload_optimizer.device isn't nvme: weights "
            "lie there only beside masters and moments. Set both (strategy.config, strategy.config_path)."
        )
    unheeded = ["aio"] if settings.get("aio") else []
    for name, part in asked.items():
        unheeded += [f"zero_optimization.{name}.{key}" for key in part if key not in ("device", "nvme_path")]
        zero[name] = {"device": "cpu", "pin_memory": False}
    paths = {name: part.get("nvme_path") or tempfile.gettempdir() for name, part in asked.items()}
    place = Place(optimizer=paths["offload_optimizer"], weights=paths.get("offload_param"))
    return {**settings, "zero_optimization": {"sub_group_size": SUB_GROUP, **zero}}, place, unheeded


def check_fields(it: Any) -> None:
    """Refuse what is out of range, or means nothing beside the rest.

    Raises:
        ConfigError: says which.
    """
    if it.stage not in (1, 2, 3):
        raise ConfigError(f"DeepSpeedStrategy: stage={it.stage} is not 1, 2 or 3 (strategy.stage).")
    for key in ("bucket_mb", "prefetch_mb"):
        if (value := getattr(it, key)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"DeepSpeedStrategy: {key}={value} is not positive. Try 100 (strategy.{key}).")
    only_3 = {"offload_parameters": Offload.none, "hpz": False, "persist_numbers": None, "prefetch_mb": None,
              "sub_group_numbers": None}  # fmt: skip
    if it.offload_optimizer is Offload.nvme:
        only_3["offload_optimizer"] = Offload.none
    for key, default in only_3.items():
        if it.stage != 3 and (value := getattr(it, key)) != default:
            raise ConfigError(
                f"DeepSpeedStrategy: {key}={getattr(value, 'name', value)} means nothing with stage={it.stage}. "
                f"Leave it out, or use strategy=zero3 (strategy.{key})."
            )
    if it.offload_parameters is Offload.nvme and it.offload_optimizer is not Offload.nvme:
        raise ConfigError(
            f"DeepSpeedStrategy: offload_parameters=nvme with offload_optimizer={it.offload_optimizer.name}: weights "
            "lie on NVMe only beside masters and moments. Use strategy=zero_infinity (strategy.offload_optimizer)."
        )
    if it.nvme_path is not None and it.offload_optimizer is not Offload.nvme:
        raise ConfigError(
            f"DeepSpeedStrategy: nvme_path={it.nvme_path} means nothing with offload_optimizer="
            f"{it.offload_optimizer.name}. Leave it out, or use strategy=zero_infinity (strategy.nvme_path)."
        )
    if it.hpz_size is not None and not it.hpz:
        raise ConfigError(
            f"DeepSpeedStrategy: hpz_size={it.hpz_size} means nothing with hpz=false. Leave it out, or use "
            "strategy=zero_hpz (strategy.hpz_size)."
        )
    for key, least in (("persist_numbers", 0), ("hpz_size", 2), ("sub_group_numbers", 1)):
        if (number := getattr(it, key)) is not None and number < least:
            raise ConfigError(f"DeepSpeedStrategy: {key}={number} is below {least}. Raise it (strategy.{key}).")


def numbers(mb: float | None) -> int | None:
    """MiB as so many fp32 numbers; an even count, which DeepSpeed wants."""
    return None if mb is None else max(2, int(mb * 2**20) // 8 * 2)
