"""Files of `accelerate config`: which of their keys have a say under this loop, and what they must agree with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from strategies.base import Plan
from strategies.errors import ConfigError, nearest
from strategies.precision import Numbers
from strategies.world import Launch

TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_ELSEWHERE = {
    "DEEPSPEED": "Use strategy=zero1, zero2 or zero3, which take a ds_config themselves (strategy)",
    "MEGATRON_LM": "Use strategy=fsdp_full (strategy)",
}

# They tell `accelerate launch` how to start processes, or Accelerate how to load and save; both happen elsewhere.
NO_SAY = ("machine_rank", "main_process_ip", "main_process_port", "main_training_function", "mpirun_config",
          "rdzv_backend", "same_network")  # fmt: skip
FSDP_NO_SAY = ("fsdp_cpu_ram_efficient_loading", "fsdp_state_dict_type")

_KNOWN = ("compute_environment", "distributed_type", "dynamo_config", "fsdp_config", "gpu_ids", "mixed_precision",
          "num_machines", "num_processes", "use_cpu")  # fmt: skip
_TPU = "TPUs aren't supported"
_MUST_BE_OFF = {
    "command_file": _TPU,
    "commands": _TPU,
    "debug": "It checks collectives of Accelerate that this loop doesn't use",
    "deepspeed_config": "Use strategy=zero1, zero2 or zero3",
    "downcast_bf16": _TPU,
    "dynamo_backend": "Write it into dynamo_config",
    "enable_cpu_affinity": "Bind processes where they are launched, with numactl",
    "fp8_config": "There is no precision of 8 bits; use precision=bf16",
    "fp16": "Write mixed_precision",
    "megatron_lm_config": "Use strategy=fsdp_full",
    "parallelism_config": "Use strategy=fsdp_hybrid for groups of ranks",
    "tpu_env": _TPU,
    "tpu_name": _TPU,
    "tpu_use_cluster": _TPU,
    "tpu_use_sudo": _TPU,
    "tpu_vm": _TPU,
}
_DYNAMO_OFF = ("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "dynamo_use_regional_compilation")
_FSDP_KNOWN = ("fsdp_auto_wrap_policy", "fsdp_min_num_params", "fsdp_reshard_after_forward",
               "fsdp_transformer_layer_cls_to_wrap", "fsdp_version")  # fmt: skip
_FSDP_OFF = {
    "fsdp_activation_checkpointing": "Use trainer.activation_checkpointing=full",
    "fsdp_activation_checkpointing_offload": "Use trainer.activation_checkpointing=full",
    "fsdp_backward_prefetch": "Version 2 has none; `accelerate to-fsdp2` takes it away",
    "fsdp_forward_prefetch": "Use strategy=fsdp_full strategy.prefetch=2",
    "fsdp_ignored_modules": "All parameters are cut here",
    "fsdp_offload_params": "Use strategy=fsdp_full strategy.cpu_offload=true",
    "fsdp_sharding_strategy": "Version 2 has fsdp_reshard_after_forward; `accelerate to-fsdp2` translates it",
    "fsdp_sync_module_states": "Version 2 has none; `accelerate to-fsdp2` takes it away",
    "fsdp_use_orig_params": "Version 2 has none; `accelerate to-fsdp2` takes it away",
}
_WRAPS = ("NO_WRAP", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP")

_ENVIRONMENT_TYPES = {
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
}
_ENVIRONMENT_FLAGS = {
    "ACCELERATE_CPU_AFFINITY": "enable_cpu_affinity",
    "ACCELERATE_DEBUG_MODE": "debug",
    "ACCELERATE_USE_CPU": "use_cpu",
}
_PRECISIONS = {
    "no": (Numbers.fp32, Numbers.tf32, Numbers.fp64),
    "bf16": (Numbers.bf16,),
    "fp16": (Numbers.fp16,),
}


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig:
    """What a file and `accelerate launch` together ask for; checked key by key."""

    source: str
    """Whose words these are, for messages."""
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | None) -> AccelerateConfig:
        """From a file in YAML or JSON, and the variables of `accelerate launch`.

        Raises:
            ConfigError: it can't be read, the two disagree, or a key asks for what isn't supported here; names it.
        """
        source = path or "accelerate launch"
        values, launched = {} if path is None else _read(path), _from_environment()
        for key, value in launched.items():
            if key in values and _differ(values[key], value):
                raise ConfigError(
                    f"AccelerateStrategy: {source}: {key}: {values[key]}, and `accelerate launch` was told {value}. "
                    "Launch with this file, or with torchrun (strategy.config_path)."
                )
        if launched.get("distributed_type") == "FSDP" and path is None:
            raise ConfigError(
                "AccelerateStrategy: `accelerate launch` was told to use FSDP, whose settings are read from a file. "
                "Name it (strategy.config_path)."
            )
        found = cls(source=source, values=launched | values)
        found._refuse_unsupported()
        return found

    @property
    def distributed_type(self) -> str | None:
        """One of `TYPES`; None: as it was launched."""
        return self.values.get("distributed_type")

    @property
    def with_say(self) -> dict[str, str]:
        """What must be the same on every machine."""
        return {key: str(value) for key, value in self.values.items() if key not in (*NO_SAY, "gpu_ids")}

    @property
    def fsdp(self) -> dict[str, Any]:
        """Of the part `fsdp_config`."""
        return dict(self.values.get("fsdp_config") or {})

    @property
    def without_say(self) -> list[str]:
        """Keys that are set and mean nothing here."""
        return [key for key in (*NO_SAY, *FSDP_NO_SAY) if key in self.values or key in self.fsdp]

    def fsdp_arguments(self) -> dict[str, Any]:
        """Of Accelerate's plugin for FSDP."""
        given = self.fsdp
        classes = given.get("fsdp_transformer_layer_cls_to_wrap")
        found = {
            "fsdp_version": 2,
            "reshard_after_forward": given.get("fsdp_reshard_after_forward", True),
            "auto_wrap_policy": str(given.get("fsdp_auto_wrap_policy") or "NO_WRAP").lower(),
            "transformer_cls_names_to_wrap": str(classes).split(",") if classes else None,
            "cpu_ram_efficient_loading": False,
        }
        if "fsdp_min_num_params" in given:
            found["min_num_params"] = given["fsdp_min_num_params"]
        return found

    def refuse_launch(self, launch: Launch) -> None:
        """Hold it against how this process was started.

        Raises:
            ConfigError: names the key.
        """
        processes, machines = self.values.get("num_processes"), self.values.get("num_machines")
        if processes not in (None, -1, launch.size):
            self._refuse("num_processes", f"This run has {launch.size}")
        if "LOCAL_WORLD_SIZE" in os.environ and machines not in (None, launch.size // launch.local_size):
            self._refuse("num_machines", f"This run has {launch.size // launch.local_size}")
        if self.distributed_type == "NO" and launch.size > 1:
            self._refuse("distributed_type", f"This run has {launch.size} processes, which would train apart")
        chosen, visible = self.values.get("gpu_ids"), os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen not in (None, "", "all") and str(chosen).replace(" ", "") != visible:
            self._refuse("gpu_ids", f"Here CUDA_VISIBLE_DEVICES={visible} says which; give it the same")

    def refuse_device(self, device: torch.device) -> None:
        """Hold it against where this rank computes.

        Raises:
            ConfigError: names the key.
        """
        if self.values.get("use_cpu") and device.type != "cpu":
            self._refuse("use_cpu", f"This run is on {device.type}; use backend=gloo")

    def refuse_plan(self, plan: Plan) -> None:
        """Hold it against how a step will go.

        Raises:
            ConfigError: names the key.
        """
        precision, numbers = self.values.get("mixed_precision"), plan.precision.numbers
        if precision is not None and numbers not in _PRECISIONS[precision]:
            right = _PRECISIONS[precision][0].name
            self._refuse("mixed_precision", f"This run has precision={numbers.name}; use precision={right}")
        dynamo = (self.values.get("dynamo_config") or {}).get("dynamo_backend")
        if dynamo is not None and _on(dynamo) is not plan.compile:
            wanted = str(_on(dynamo)).lower()
            self._refuse("dynamo_config.dynamo_backend", f"This run has compile={not _on(dynamo)}; use {wanted}")
        if plan.compile and self.distributed_type == "FSDP":
            self._refuse("distributed_type", "It isn't compiled here; use strategy=fsdp_full for compile=true")

    def _refuse_unsupported(self) -> None:
        values, known = self.values, {*_KNOWN, *NO_SAY, *_MUST_BE_OFF}
        self._refuse_unknown(values, known)
        for key, hint in _MUST_BE_OFF.items():
            if _on(values.get(key)):
                self._refuse(key, hint)
        if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
            self._refuse("compute_environment", "Here it is LOCAL_MACHINE")
        kind, precision = values.get("distributed_type"), values.get("mixed_precision")
        if kind is not None and str(kind) not in TYPES:
            self._refuse("distributed_type", _ELSEWHERE.get(str(kind), f"Accepted are {', '.join(TYPES)}"))
        if precision is not None and str(precision) not in _PRECISIONS:
            self._refuse("mixed_precision", f"Accepted are {', '.join(_PRECISIONS)}")
        self._is("num_processes", lambda value: type(value) is int, "It is a whole number")
        self._is("num_machines", lambda value: type(value) is int, "It is a whole number")
        self._is("use_cpu", lambda value: type(value) is bool, "It is true or false")
        for key in ("dynamo_config", "fsdp_config"):
            self._is(key, lambda value: isinstance(value, dict), "It is a list of keys and values")
        self._refuse_dynamo()
        self._refuse_fsdp()

    def _refuse_dynamo(self) -> None:
        given = self.values.get("dynamo_config") or {}
        self._refuse_unknown(given, {"dynamo_backend", *_DYNAMO_OFF}, "dynamo_config.")
        backend = given.get("dynamo_backend")
        if _on(backend) and str(backend).upper() != "INDUCTOR":
            self._refuse("dynamo_config.dynamo_backend", "Accepted are NO and INDUCTOR")
        for key in _DYNAMO_OFF:
            if _on(given.get(key)) and given[key] != "default":
                self._refuse(f"dynamo_config.{key}", "Leave it out")

    def _refuse_fsdp(self) -> None:
        given = self.fsdp
        if self.distributed_type != "FSDP":
            if given:
                self._refuse("fsdp_config", f"It means nothing with distributed_type: {self.distributed_type}")
            return
        self._refuse_unknown(given, {*_FSDP_KNOWN, *FSDP_NO_SAY, *_FSDP_OFF}, "fsdp_config.")
        if given.get("fsdp_version") != 2:
            self._refuse("fsdp_config.fsdp_version", "It must be 2; `accelerate to-fsdp2` translates the file")
        for key, hint in _FSDP_OFF.items():
            if _on(given.get(key)) and given[key] != "NO_PREFETCH":
                self._refuse(f"fsdp_config.{key}", hint)
        wrap = str(given.get("fsdp_auto_wrap_policy") or "NO_WRAP")
        if wrap not in _WRAPS:
            self._refuse("fsdp_config.fsdp_auto_wrap_policy", f"Accepted are {', '.join(_WRAPS)}")
        for key, policy in (
            ("fsdp_transformer_layer_cls_to_wrap", "TRANSFORMER_BASED_WRAP"),
            ("fsdp_min_num_params", "SIZE_BASED_WRAP"),
        ):
            if given.get(key) and wrap != policy:
                self._refuse(f"fsdp_config.{key}", f"It means nothing with fsdp_auto_wrap_policy: {wrap}")
        self._is("fsdp_config.fsdp_min_num_params", lambda value: type(value) is int, "It is a whole number")
        self._is("fsdp_config.fsdp_reshard_after_forward", lambda value: type(value) is bool, "It is true or false")

    def _refuse_unknown(self, given: Mapping[str, Any], known: set[str], prefix: str = "") -> None:
        for key in given:
            if key not in known:
                self._refuse(f"{prefix}{key}", f"There is no such key. {nearest(str(key), known).rstrip('.')}")

    def _is(self, key: str, right: Callable[[Any], bool], what: str) -> None:
        value = self._value(key)
        if value is not None and not right(value):
            self._refuse(key, what)

    def _value(self, key: str) -> Any:
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def _refuse(self, key: str, why: str) -> None:
        value = " ".join(str(self._value(key)).split())
        raise ConfigError(
            f"AccelerateStrategy: {self.source}: {key}: {value} can't be honoured. {why} (strategy.config_path)."
        )


def _differ(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return any(mine.get(key) != value for key, value in theirs.items())
    return bool(mine != theirs)


def _on(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("no", "false", "none")


def _read(path: str) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        found = yaml.safe_load(text)  # JSON too
    except (OSError, RuntimeError, ValueError, yaml.YAMLError) as error:  # no such user, no text, a null byte
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"AccelerateStrategy: {path} can't be read: {reason}. Give a file of `accelerate config`, "
            "in YAML or JSON (strategy.config_path)."
        ) from error
    if not isinstance(found, dict) or "distributed_type" not in found:
        raise ConfigError(
            f"AccelerateStrategy: {path} has no distributed_type. Give a file of `accelerate config`, in YAML or JSON "
            "(strategy.config_path)."
        )
    for key in ("distributed_type", "mixed_precision"):
        if found.get(key) is False:  # an unquoted `no`
            found[key] = "NO" if key == "distributed_type" else "no"
    return {str(key): value for key, value in found.items()}


def _from_environment() -> dict[str, Any]:
    """What `accelerate launch` was told, as keys of its file; what it always sets and means nothing is left out."""
    variables, found = os.environ, dict[str, Any]()
    for name, kind in _ENVIRONMENT_TYPES.items():
        if _on(variables.get(name)):
            found["distributed_type"] = kind
    if _on(precision := variables.get("ACCELERATE_MIXED_PRECISION")):
        found["mixed_precision"] = precision
    if _on(dynamo := variables.get("ACCELERATE_DYNAMO_BACKEND")):
        found["dynamo_config"] = {"dynamo_backend": dynamo}
    if _on(variables.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        found["parallelism_config"] = "ACCELERATE_USE_PARALLELISM_CONFIG"
    for name, key in _ENVIRONMENT_FLAGS.items():
        if _on(variables.get(name)):
            found[key] = True
    return found
