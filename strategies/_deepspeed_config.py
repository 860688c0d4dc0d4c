"""A raw `ds_config`, read, compared with our own configuration and merged with it. Imports no DeepSpeed.

What DeepSpeed does (partitioning, communication, offload) is handed on; what a run of ours says for itself (batch,
precision, clipping, optimizer, schedule) is filled in where the file says "auto" or nothing, and compared where it
says more.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from strategies._deepspeed_keys import (
    ACTIVATIONS,
    AUTO,
    KEYS,
    OURS,
    PASSED,
    at,
    checked,
    known,
    number,
    plain,
    shown,
    whole,
)
from strategies.base import Plan
from strategies.errors import ConfigError, nearest
from strategies.precision import Numbers

BUCKET = 100 * 2**20 // 4
"""Numbers in a bucket where nobody says otherwise: 100 MiB."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What this run says for itself."""

    stage: int
    size: int
    """Ranks."""
    plan: Plan
    hidden_size: int | None
    """Of the model, for bucket sizes that say "auto"; None: DeepSpeed's own sizes."""
    own: Mapping[str, Any]
    """Those fields of the strategy that the user set, as `zero_optimization` has them."""


@dataclass(frozen=True)
class _Fact:
    """What a key has to say, if it says anything."""

    key: str
    value: Any
    where: str
    """Our key, or why."""


def read(config: Mapping[str, Any] | None, config_path: str | None) -> dict[str, Any]:
    """The raw `ds_config`, as it was written; empty where neither is given.

    Args:
        config: its content.
        config_path: or a JSON file that holds it; each rank reads its own.

    Raises:
        ConfigError: both are given; the file can't be read, or isn't one JSON object.
    """
    if config_path is None:
        return dict(plain(config or {}))
    if config:
        raise ConfigError(f"ds_config: it is given twice, as a file and as values. Leave one out {KEYS}.")
    try:
        found = json.loads(Path(config_path).expanduser().read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"ds_config: the file {config_path} can't be read: {reason}. Name a JSON file (strategy.config_path)."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"ds_config: the file {config_path} isn't JSON: {error}. Correct it (strategy.config_path)."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"ds_config: the file {config_path} holds no object in braces. Name a ds_config (strategy.config_path)."
        )
    return found


def merged(raw: Mapping[str, Any], ours: Ours) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, without one for autocast.

    Args:
        raw: from `read`; not changed.
        ours: what this run says.

    Raises:
        ConfigError: a key is unknown, gone or not taken over; a value isn't of its kind, or contradicts ours.
    """
    said = checked(known(raw), {**PASSED, **OURS})
    _refuse_schedule(said.get("scheduler", {}))
    _refuse_other_stage(said, ours.stage)
    _refuse_disagreement(said, [*_batch(ours), *_precision(ours.plan), *_rest(), *_own(ours.own, "zero_optimization")])
    plan = ours.plan
    return {
        **{key: value for key, value in said.items() if key in PASSED},
        "train_batch_size": plan.micro_batch * plan.accumulation * ours.size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,  # we clip; left out, DeepSpeed clips to 1
        "zero_optimization": _zero(raw.get("zero_optimization") or {}, said.get("zero_optimization", {}), ours),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def completed(settings: dict[str, Any], bucket: int, *, pin_memory: bool) -> dict[str, Any]:
    """With our own sizes where nobody said any: DeepSpeed's buckets take gigabytes.

    Args:
        settings: from `merged`.
        bucket: numbers in a bucket.
        pin_memory: whether what is offloaded is pinned, unless somebody says.
    """
    zero = settings["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        place = zero.get(name) or {}
        if place.get("device") == "cpu":
            zero[name] = {"pin_memory": pin_memory, **place}
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero["stage"] == 3:
        sizes = {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
    return {**settings, "zero_optimization": {**sizes, "overlap_comm": True, **zero}}


def check_optimizer(raw: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Compare the section `optimizer` with the optimizer that our configuration made.

    Args:
        raw: from `read`.
        optimizer: torch's or DeepSpeed's own, not yet wrapped, its rates as configured.

    Raises:
        ConfigError: they disagree.
    """
    said = checked(known({"optimizer": raw.get("optimizer")}), OURS).get("optimizer", {})
    name, adam = type(optimizer).__name__, _is_adam(optimizer)
    kind = said.get("type", name)
    if not (adam and kind.lower() in ("adam", "adamw")) and kind.lower() != name.lower():
        raise _disagreement([_words(_Fact("optimizer.type", name, "optimizer"), kind)])

    mine = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "decays")}
    if adam:
        decoupled = getattr(optimizer, "adam_w_mode", mine.pop("decoupled_weight_decay", True))
        mine = {"bias_correction": True, "amsgrad": False, **mine, "adam_w_mode": bool(decoupled)}
        mine["torch_adam"] = type(optimizer).__module__.startswith("torch.")
    if "weight_decay" in mine:
        decays = [group["weight_decay"] for group in optimizer.param_groups if group.get("decays", True)]
        mine["weight_decay"] = max(decays, default=AUTO)  # no group decays: nothing to compare with

    params = {key: value for key, value in said.get("params", {}).items() if value is not None and value != AUTO}
    facts = []
    for key in params:
        if key not in mine:
            raise ConfigError(f"ds_config: {name} has no key {key!r}, in optimizer.params. {nearest(key, mine)} {KEYS}")
        if mine[key] != AUTO:
            ours = {"betas": "optimizer.beta1, optimizer.beta2", "torch_adam": "optimizer"}
            facts.append(_Fact(f"optimizer.params.{key}", mine[key], ours.get(key, f"optimizer.{key}")))
    _refuse_disagreement({"optimizer": {"params": params}}, facts)


def _is_adam(optimizer: Optimizer) -> bool:
    return any(each.__name__ in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam") for each in type(optimizer).__mro__)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if [each for each, _ in pairs].count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


# Comparing.


def _batch(ours: Ours) -> Iterable[_Fact]:
    plan = ours.plan
    total = plan.micro_batch * plan.accumulation * ours.size
    yield _Fact("train_batch_size", total, "trainer.global_batch")
    yield _Fact("train_micro_batch_size_per_gpu", plan.micro_batch, "trainer.micro_batch")
    yield _Fact("gradient_accumulation_steps", plan.accumulation, "trainer.global_batch by micro-batch and ranks")
    none = "=null" if plan.clip_norm is None else ""
    yield _Fact("gradient_clipping", plan.clip_norm or 0.0, f"trainer.clip_norm{none}")


def _precision(plan: Plan) -> Iterable[_Fact]:
    numbers = plan.precision.numbers
    where = f"precision={numbers.name}"
    for name in ("bf16", "bfloat16"):
        yield _Fact(f"{name}.enabled", numbers is Numbers.bf16, where)
        yield _Fact(f"{name}.check_grad_overflow", True, "trainer.on_nonfinite")
        yield _Fact(f"{name}.bf16_master_weights_and_grads", False, "precision, with weights in fp32")
        yield _Fact(f"{name}.bf16_optimizer_states", False, "precision, with moments in fp32")
    half = numbers in (Numbers.bf16, Numbers.fp16)
    yield _Fact("torch_autocast.enabled", half, where)
    if half:
        yield _Fact("torch_autocast.dtype", numbers.name, where)
        yield _Fact("torch_autocast.lower_precision_safe_modules", [], "torch's choice of operators")
    yield _Fact("fp16.enabled", numbers is Numbers.fp16, where)
    yield _Fact("fp16.fp16_master_weights_and_grads", False, "precision, with weights in fp32")
    if numbers is Numbers.fp16:
        yield _Fact("fp16.loss_scale", 0, "which is dynamic")
        power = whole(math.log2(plan.precision.loss_scale))
        yield _Fact("fp16.initial_scale_power", power, "log2 of precision.loss_scale")
        yield _Fact("fp16.loss_scale_window", plan.precision.growth_interval, "precision.growth_interval")
        yield _Fact("fp16.hysteresis", 1, "the scale falls at each overflow")
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        yield _Fact(f"data_types.{key}", "fp32", "precision, with everything kept in fp32")


def _rest() -> Iterable[_Fact]:
    yield _Fact("gradient_allreduce_op", "mean", "the loss is a mean over tokens")
    yield _Fact("gradient_predivide_factor", 1, "ZeRO divides once")
    yield _Fact("zero_optimization.compute_grad_norm", True, "every step reports it")
    yield _Fact("zero_allow_untested_optimizer", True, "optimizer")
    yield _Fact("zero_force_ds_cpu_optimizer", False, "optimizer")
    yield _Fact("dataloader_drop_last", False, "data")
    if not torch.cuda.is_available():
        for key in (
            "aio.use_gds",
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.zero_quantized_gradients",
        ):
            yield _Fact(key, False, "DeepSpeed has it for CUDA devices only")
    for key in ACTIVATIONS:
        value = 0 if key == "number_checkpoints" else False
        yield _Fact(f"activation_checkpointing.{key}", value, "trainer.activation_checkpointing")


def _own(own: Mapping[str, Any], path: str) -> Iterable[_Fact]:
    for key, value in own.items():
        if isinstance(value, Mapping):
            yield from _own(value, f"{path}.{key}")
        else:
            yield _Fact(f"{path}.{key}", value, "the strategy's own field")


def _refuse_disagreement(said: dict[str, Any], facts: Iterable[_Fact]) -> None:
    found = {}
    for fact in facts:
        section, key = at(said, fact.key)
        if key in section and not _agree(section[key], fact.value):
            found[fact.key] = _words(fact, section[key])
    if found:
        batch = " Batch sizes in numbers need trainer.micro_batch too." if any(key in found for key in _BATCH) else ""
        raise _disagreement(found.values(), batch)


def _words(fact: _Fact, value: Any) -> str:
    return f"{fact.key}={shown(value)}, ours is {shown(fact.value)} ({fact.where})"


def _disagreement(words: Iterable[str], advice: str = "") -> ConfigError:
    return ConfigError(
        f'ds_config: {"; ".join(words)}. Set ours alike, or write "auto" in the ds_config {KEYS}.{advice}'
    )


def _agree(value: Any, ours: Any) -> bool:
    if isinstance(ours, (list, tuple)):
        alike = isinstance(value, (list, tuple)) and len(value) == len(ours)
        return alike and all(map(_agree, value, ours))
    if isinstance(ours, bool) or isinstance(value, bool):
        return value is ours
    try:
        return math.isclose(number(value), ours, rel_tol=1e-9)
    except (TypeError, ValueError):
        return bool(value == ours)


# What it says of ZeRO.


def _refuse_other_stage(said: Mapping[str, Any], ours: int) -> None:
    stage = said.get("zero_optimization", {}).get("stage", ours)
    if stage != ours:
        better = f"strategy=zero{stage}" if stage in (1, 2, 3) else "strategy=ddp" if stage == 0 else "1, 2 or 3"
        raise ConfigError(
            f"ds_config: zero_optimization.stage={stage}, and this strategy is stage {ours}. "
            f"Use {better} (strategy, zero_optimization.stage)."
        )


def _zero(raw: Mapping[str, Any], said: Mapping[str, Any], ours: Ours) -> dict[str, Any]:
    """The section `zero_optimization`."""
    zero = _over({**_sizes(raw, ours), **said, "stage": ours.stage}, ours.own)
    for name in ("offload_optimizer", "offload_param"):
        part = zero.get(name) or {}
        if part.get("device") == "nvme" and not part.get("nvme_path") and name not in ours.own:
            raise ConfigError(
                f"ds_config: zero_optimization.{name}.device=nvme, and there is no {name}.nvme_path. "
                f"Name a folder on the NVMe device {KEYS}."
            )
    if ours.stage < 3:
        _refuse_for_stage_3(zero, ours.stage)
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and ours.size % group:
        raise ConfigError(
            f"ds_config: zero_optimization.zero_hpz_partition_size={group} doesn't divide {ours.size} ranks. "
            f"Choose a divisor {KEYS}."
        )
    return zero


def _sizes(raw: Mapping[str, Any], ours: Ours) -> dict[str, Any]:
    """What sizes that say "auto" are, as transformers fills them in."""
    if ours.hidden_size is None:
        return {}
    sizes = {"reduce_bucket_size": ours.hidden_size**2}
    if ours.stage == 3:
        sizes["stage3_prefetch_bucket_size"] = int(0.9 * ours.hidden_size**2)
        sizes["stage3_param_persistence_threshold"] = 10 * ours.hidden_size
    return {key: value for key, value in sizes.items() if raw.get(key) == AUTO}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        found[key] = _over(found.get(key, {}), value) if isinstance(value, Mapping) else value
    return found


def _refuse_for_stage_3(zero: Mapping[str, Any], stage: int) -> None:
    keys = ("zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size")
    asked = {key: zero[key] for key in keys if zero.get(key, 0) > 1 or zero.get(key) is True}
    for name, devices in (("offload_param", ("cpu", "nvme")), ("offload_optimizer", ("nvme",))):
        device = (zero.get(name) or {}).get("device")
        asked |= {f"{name}.device": device} if device in devices else {}
    for key, value in asked.items():
        raise ConfigError(
            f"ds_config: zero_optimization.{key}={shown(value)} is for stage 3, and this strategy is stage {stage}. "
            "Use strategy=zero3, or leave it out (strategy, strategy.config, strategy.config_path)."
        )


def _refuse_schedule(section: Mapping[str, Any]) -> None:
    """The rate is set from outside before each step; say which schedule of ours has the same shape."""
    kind = section.get("type")
    if kind is None:
        return
    shape = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}.get(kind)
    if shape is None:
        instead = "schedule=constant, linear, cosine, wsd or inverse_sqrt, none of which has its shape"
    else:
        said = {key: value for key, value in section.get("params", {}).items() if value is not None}
        words = {
            "schedule.warmup": said.get("warmup_num_steps", 1000),
            "schedule.final_ratio": said.get("cos_min_ratio", 1e-4) if shape == "cosine" else AUTO,
            "optimizer.lr": said.get("warmup_max_lr", AUTO),
            "trainer.max_steps": said.get("total_num_steps", AUTO),
        }
        given = [f"{key}={whole(value)}" for key, value in words.items() if value != AUTO]
        log = "" if said.get("warmup_type") == "linear" else ", whose warmup is linear and not logarithmic"
        instead = " ".join([f"schedule={shape}", *given]) + log
    raise ConfigError(
        f"ds_config: scheduler.type={shown(kind)}, and the learning rate follows our schedule. "
        f"Take the section out and use {instead} (schedule)."
    )
