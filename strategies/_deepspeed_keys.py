"""The keys that a `ds_config` of DeepSpeed 0.19.8 may hold, the kinds of their values, and what isn't taken over."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

from strategies.errors import ConfigError, nearest

AUTO = "auto"
KEYS = "(strategy.config, strategy.config_path)"

Kind: TypeAlias = Callable[[Any], Any]
"""Gives a value as DeepSpeed wants it, or raises ValueError with what it should be."""


def number(value: Any) -> float:
    """Also where it is written as a string, such as "1e-5"."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            found = float(value)
            return found if isinstance(value, str) else value
    return _refuse("a number")


def count(value: Any) -> int:
    """Also where it is written as 5e8."""
    found = number(value)
    return int(found) if found >= 0 and float(found).is_integer() else _refuse("a whole number")


def size(value: Any) -> int:
    """A count of at least one."""
    return count(value) or _refuse("a whole number above 0")


def share(value: Any) -> float:
    """From 0 to 1."""
    found = number(value)
    return found if 0 <= found <= 1 else _refuse("a number from 0 to 1")


def flag(value: Any) -> bool:
    """True or false and nothing that only looks like it."""
    return value if isinstance(value, bool) else _refuse("true or false")


def text(value: Any) -> str:
    """Any string."""
    return value if isinstance(value, str) else _refuse("a string")


def device(value: Any) -> str:
    """Where something is offloaded to."""
    return str(value) if value in ("none", "cpu", "nvme") else _refuse("none, cpu or nvme")


def dtype(value: Any) -> str:
    """A number format by the one name that DeepSpeed takes everywhere."""
    others = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
    name = str(value).lower().removeprefix("torch.")
    name = others.get(name, name)
    return name if name in others.values() else _refuse("fp32, fp16 or bf16")


def names(value: Any) -> list[str]:
    """Strings in brackets, or one without them."""
    found = [value] if isinstance(value, str) else value
    alike = isinstance(found, list) and all(isinstance(each, str) for each in found)
    return found if alike else _refuse("a list of strings")


def section(value: Any) -> dict[str, Any]:
    """Keys of its own, whatever they are."""
    return dict(value) if isinstance(value, Mapping) else _refuse("a section in braces")


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


Table: TypeAlias = Mapping[str, "Kind | Table"]

ZERO: Table = {
    "stage": count,
    "allgather_bucket_size": count,
    "allgather_partitions": flag,
    "compute_grad_norm": flag,
    "contiguous_gradients": flag,
    "elastic_checkpoint": flag,
    "enable_sanity_checks": flag,
    "ignore_unused_parameters": flag,
    "leaf_module": {"classes": names, "names": names, "name_suffixes": names},
    "legacy_stage1": flag,
    "load_from_fp32_weights": flag,
    "log_trace_cache_warnings": flag,
    "memory_efficient_linear": flag,
    "offload_optimizer": {
        "device": device,
        "nvme_path": text,
        "buffer_count": count,
        "pin_memory": flag,
        "pipeline_read": flag,
        "pipeline_write": flag,
        "fast_init": flag,
        "ratio": share,
        "cpuadam_cores_perc": share,
    },
    "offload_param": {
        "device": device,
        "nvme_path": text,
        "buffer_count": count,
        "buffer_size": count,
        "max_in_cpu": count,
        "pin_memory": flag,
    },
    "overlap_comm": flag,
    "override_module_apply": flag,
    "parameter_alignment": flag,
    "pipeline_loading_checkpoint": flag,
    "reduce_bucket_size": size,
    "reduce_scatter": flag,
    "round_robin_gradients": flag,
    "save_muon_momentum_buffer_in_memory": flag,
    "stage3_allgather_sequential": flag,
    "stage3_gather_16bit_weights_on_model_save": flag,
    "stage3_max_live_parameters": count,
    "stage3_max_reuse_distance": count,
    "stage3_model_persistence_threshold": count,
    "stage3_module_granularity_threshold": count,
    "stage3_param_persistence_threshold": count,
    "stage3_prefetch_bucket_size": count,
    "stage3_use_all_reduce_for_fetch_params": flag,
    "sub_group_size": count,
    "use_multi_rank_bucket_allreduce": flag,
    "zero_hpz_partition_size": count,
    "zero_quantized_gradients": flag,
    "zero_quantized_weights": flag,
}

PASSED: Table = {
    "zero_optimization": ZERO,
    "aio": {
        "block_size": size,
        "queue_depth": size,
        "intra_op_parallelism": size,
        "single_submit": flag,
        "overlap_events": flag,
        "use_gds": flag,
    },
    "comms_logger": {"enabled": flag, "prof_all": flag, "prof_ops": names, "verbose": flag, "debug": flag},
    "communication_data_type": dtype,
    "disable_python_gc": flag,
    "dump_state": flag,
    "flops_profiler": {
        "enabled": flag,
        "recompute_fwd_factor": number,
        "profile_step": count,
        "module_depth": number,
        "top_modules": count,
        "detailed": flag,
        "output_file": text,
    },
    "log_level": text,
    "memory_breakdown": flag,
    "timers": {"throughput": {"enabled": flag, "synchronized": flag}},
    "wall_clock_breakdown": flag,
}
"""DeepSpeed's own business: handed on."""

ACTIVATIONS: Table = {
    "partition_activations": flag,
    "cpu_checkpointing": flag,
    "contiguous_memory_optimization": flag,
    "number_checkpoints": count,
    "synchronize_checkpoint_boundary": flag,
    "profile": flag,
}
_BF16: Table = {
    "enabled": flag,
    "immediate_grad_update": flag,
    "check_grad_overflow": flag,
    "bf16_master_weights_and_grads": flag,
    "bf16_optimizer_states": flag,
}
OURS: Table = {
    "train_batch_size": size,
    "train_micro_batch_size_per_gpu": size,
    "gradient_accumulation_steps": size,
    "gradient_clipping": number,
    "gradient_allreduce_op": text,
    "gradient_predivide_factor": number,
    "bf16": _BF16,
    "bfloat16": _BF16,
    "fp16": {
        "enabled": flag,
        "auto_cast": flag,
        "loss_scale": number,
        "initial_scale_power": count,
        "loss_scale_window": size,
        "hysteresis": count,
        "consecutive_hysteresis": flag,
        "min_loss_scale": number,
        "fp16_master_weights_and_grads": flag,
    },
    "torch_autocast": {"enabled": flag, "dtype": dtype, "lower_precision_safe_modules": names},
    "data_types": {
        "grad_accum_dtype": dtype,
        "param_dtype": dtype,
        "buffer_dtype": dtype,
        "keep_in_fp32_modules": names,
    },
    "optimizer": {"type": text, "params": section},
    "scheduler": {"type": text, "params": section},
    "steps_per_print": number,
    "zero_allow_untested_optimizer": flag,
    "zero_force_ds_cpu_optimizer": flag,
    "dataloader_drop_last": flag,
    "activation_checkpointing": ACTIVATIONS,
}
"""Said by our own configuration: compared with it."""

OLD_NAMES = {
    "aio.thread_count": "intra_op_parallelism",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}

OLD_OFFLOADS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}

_GONE = "DeepSpeed has removed it. Leave it out"
_CHECKPOINTS = "checkpoints are written by our own writer. Leave it out, and set checkpoint"
_MEASURED = "measurements go to our own loggers. Leave it out, and use"
REFUSED = {
    "activation_checkpointing.enabled": "DeepSpeed has no such key. Use trainer.activation_checkpointing",
    "amp": "DeepSpeed has removed it. Use precision=bf16 or precision=fp16",
    "autotuning": "it starts runs of its own. Leave it out",
    "checkpoint": _CHECKPOINTS,
    "comet": f"{_MEASURED} logger=tensorboard, wandb, mlflow or csv",
    "compile": "compiling is ours. Use compile=true",
    "compression_training": _GONE,
    "csv_monitor": f"{_MEASURED} logger=csv",
    "curriculum_learning": _GONE,
    "data_efficiency": "which samples a step takes is ours. Leave it out",
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "DeepSpeed passes over it. Leave it out",
    "eigenvalue": _GONE,
    "elasticity": f"{_GONE}: another number of ranks goes on from the same checkpoint",
    "expert_parallel": "experts aren't spread over ranks here. Leave it out",
    "fp32_allreduce": 'DeepSpeed calls it "communication_data_type": "fp32". Write that',
    "graph_harvesting": _GONE,
    "hybrid_engine": "it is for generation. Leave it out",
    "managed_gradient_accumulation": "accumulation is ours. Leave it out",
    "nebula": f"{_GONE}: checkpoints are written by our own writer",
    "optimizer.legacy_fusion": "mixed precision is ours. Leave it out",
    "pipeline": "there are no pipeline stages here. Leave it out",
    "prescale_gradients": "ZeRO can't with reduce_scatter. Leave it out",
    "progressive_layer_drop": _GONE,
    "quantize_training": _GONE,
    "seq_parallel_communication_data_type": "sequences aren't cut here. Leave it out",
    "sequence_parallel_size": "sequences aren't cut here. Leave it out",
    "sparse_attention": _GONE,
    "sparse_gradients": _GONE,
    "tensor_parallel": "tensors aren't cut here. Leave it out",
    "tensorboard": f"{_MEASURED} logger=tensorboard",
    "use_data_before_expert_parallelism": "experts aren't spread over ranks here. Leave it out",
    "wandb": f"{_MEASURED} logger=wandb",
    "weight_quantization": "weights are trained as they are. Leave it out",
    "zero_stage": "it is a key of `accelerate config`. Write zero_optimization.stage",
    "zero_optimization.cpu_offload_use_pin_memory": "it is the old form of pin_memory in offload_optimizer. Write that",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed has removed MiCS. Use strategy=mics",
    "zero_optimization.mics_shard_size": "DeepSpeed has removed MiCS. Use strategy=mics with strategy.shard_size",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer isn't ours. Leave it out",
    "zero_optimization.zenflow": "some of its updates come late. Leave it out",
    "zero_optimization.zero_quantized_nontrainable_weights": (
        "frozen weights would be rounded to 8 bits, and so would checkpoints. Leave it out"
    ),
    "zero_optimization.zeropp_loco_param": _GONE,
}
"""Not taken over, and what to do instead; what is switched off asks for nothing."""


def known(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy under today's names, without what is switched off and wouldn't be taken over.

    Raises:
        ConfigError: something that isn't taken over is switched on.
    """
    found: dict[str, Any] = plain(raw)
    for old, new in OLD_NAMES.items():
        parent, key = at(found, old)
        if key in parent and new not in parent:
            parent[new] = parent.pop(key)
    zero = found.get("zero_optimization")
    if isinstance(zero, dict):
        _rename_offloads(zero)
    for path, reason in REFUSED.items():
        parent, key = at(found, path)
        if key in parent and not _is_off(value := parent.pop(key)):
            raise ConfigError(f"ds_config: {path}={shown(value)} isn't taken over: {reason} {KEYS}.")
    for name in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        if isinstance(part := found.get(name), dict):
            part.setdefault("enabled", False)  # what DeepSpeed takes it for
    return found


def checked(config: Mapping[str, Any], table: Table, path: str = "") -> dict[str, Any]:
    """`config` with each value as its kind has it, and without what is null or "auto".

    Raises:
        ConfigError: a key isn't in the table, or a value not of its kind.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key not in table:
            where = path.rstrip(".") or "the configuration"
            raise ConfigError(f"ds_config: there is no key {key!r} in {where}. {nearest(str(key), table)} {KEYS}")
        if value is None or value == AUTO:
            continue
        kind = table[key]
        try:
            found[key] = kind(value) if callable(kind) else checked(section(value), kind, f"{path}{key}.")
        except ValueError as error:
            raise ConfigError(f"ds_config: {path}{key}={shown(value)} is not {error}. Correct it {KEYS}.") from None
    return found


def at(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The section that a dotted path leads to (empty where there is none), and the last part of the path."""
    *parts, key = path.split(".")
    for part in parts:
        inner = config.get(part)
        config = inner if isinstance(inner, dict) else {}
    return config, key


def plain(value: Any) -> Any:
    """A deep copy in dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(each) for each in value]
    return value


def whole(value: Any) -> Any:
    """5000 for 5e3; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(value: Any) -> str:
    """For a message: JSON on one line, cut where it is long."""
    words = json.dumps(value, default=str)
    return words if len(words) <= 80 else f"{words[:77]}..."


def _rename_offloads(zero: dict[str, Any]) -> None:
    asked = {old: new for old, new in OLD_OFFLOADS.items() if not _is_off(zero.get(old))}
    pin = zero.pop("cpu_offload_use_pin_memory", None) if asked else None
    for old, new in asked.items():
        if zero[old] is not True or new in zero:
            raise ConfigError(
                f"ds_config: zero_optimization.{old}={shown(zero[old])} is the old form of {new}. "
                f'Write only "{new}": {{"device": "cpu"}} {KEYS}.'
            )
        zero[new] = {"device": "cpu", "pin_memory": pin}
    for old in OLD_OFFLOADS:
        zero.pop(old, None)


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_off(value["enabled"]) if "enabled" in value else all(map(_is_off, value.values()))
    return not value or value in (AUTO, -1)
