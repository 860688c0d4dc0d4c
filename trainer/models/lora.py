"""Adapters beside frozen weights, through `peft`."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

from strategies.errors import ConfigError
from trainer.models.library import line

_MAX_RANK = 1 << 14


@dataclass(kw_only=True)
class LoRA:
    """Low-rank adapters beside frozen weights. Source: Hu et al. 2022, section 4.1; made by `peft`."""

    rank: int = 0
    """Inner width of an adapter, 8 for instance; 0: no adapters, everything is trained."""
    alpha: float = 16.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of an adapter's input."""
    target_modules: list[str] = field(default_factory=list)
    """Names (or their ends) of the modules that get one; empty: every linear layer but the output head."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"LoRA: rank={self.rank} is negative. Try 8, or 0 for none (model.lora.rank).")
        if self.rank > _MAX_RANK:
            raise ConfigError(f"LoRA: rank={self.rank} is above {_MAX_RANK}. Try 8 (model.lora.rank).")
        if self.rank == 0 and (self.dropout or self.target_modules or self.alpha != LoRA.alpha):
            raise ConfigError(
                f"LoRA: alpha={self.alpha}, dropout={self.dropout} and target_modules={self.target_modules} mean "
                "nothing while rank is 0. Set model.lora.rank=8, or leave them out (model.lora.rank)."
            )
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"LoRA: alpha={self.alpha} is not positive. Try 16 (model.lora.alpha).")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA: dropout={self.dropout} is not in [0, 1). Try 0.05 (model.lora.dropout).")


def adapted(model: Any, lora: LoRA) -> Any:
    _require_peft()
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter_config(lora))
    except ValueError as error:
        raise ConfigError(f"LoRA: {line(error)}. Name other modules (model.lora.target_modules).") from error


def adapter_config(lora: LoRA) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
    )


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("LoRA: the package peft is not installed. Install shardwright[peft] (model.lora).")
