"""Number formats, and which one each part of a step computes in."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from strategies.errors import ConfigError


class Numbers(Enum):
    """The number formats of a step. Weights, moments and reductions are fp32 unless it is `fp64`."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


@dataclass(kw_only=True)
class Precision:
    """How a step computes.

    `fp32`: as it says. `tf32`: fp32 whose matrix products may round their inputs to TF32.
    `bf16`, `fp16`: fp32 weights, autocast compute (norms and softmax stay fp32), fp32 gradient
    reduction; `fp16` scales the loss dynamically. `fp64`: everything, for tests.
    """

    numbers: Numbers = Numbers.fp32
    loss_scale: float = 65536.0
    """fp16 only: the first loss scale."""
    growth_interval: int = 2000
    """fp16 only: steps without overflow before the scale doubles."""

    def __post_init__(self) -> None:
        if not 0 < self.loss_scale < math.inf:
            raise ConfigError(
                f"Precision: loss_scale={self.loss_scale} is not positive and finite. Try 65536 (precision.loss_scale)."
            )
        if self.growth_interval < 1:
            raise ConfigError(
                f"Precision: growth_interval={self.growth_interval} is below 1. "
                "Try 2000 steps (precision.growth_interval)."
            )
        for key in ("loss_scale", "growth_interval"):
            if self.numbers is not Numbers.fp16 and (given := getattr(self, key)) != getattr(Precision, key):
                raise ConfigError(
                    f"Precision: {key}={given} is for fp16, and precision={self.numbers.name} scales no loss. "
                    f"Leave it out, or use precision=fp16 (precision.{key})."
                )

    @property
    def master_dtype(self) -> torch.dtype:
        """The dtype of weights, gradients and moments."""
        return torch.float64 if self.numbers is Numbers.fp64 else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return {Numbers.bf16: torch.bfloat16, Numbers.fp16: torch.float16}.get(self.numbers, self.master_dtype)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass on `device`.

        Each use of a weight casts it. torch's cache would keep all 16-bit copies until the end of the pass, those of
        sharded weights and of parts that are computed again among them.
        """
        if self.compute_dtype is self.master_dtype:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype, cache_enabled=False)

    def check(self, device: torch.device) -> None:
        """Refuse what `device` can't honour.

        Raises:
            ConfigError: TF32 without a CUDA device of compute capability 8 or more.
        """
        if self.numbers is not Numbers.tf32:
            return
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError(
                f"Precision: tf32 needs a CUDA device of compute capability 8.0 or more, this is {device.type}. "
                "Use precision=fp32 or precision=bf16 (precision)."
            )
