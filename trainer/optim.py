"""Optimizers: torch's own, made from named parameters in groups that can be read off."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from strategies.base import NamedParameters
from strategies.errors import ConfigError

_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
"""Parts of the names that transformers gives its embedding tables."""


@dataclass(kw_only=True)
class AbstractOptimizer(ABC):
    """An optimizer as its configuration says it."""

    lr: float = 1e-3
    """The learning rate; the schedule's factor multiplies it."""
    weight_decay: float = 0.0
    """Share of each weight, times the rate, that a step takes off; never off norms and biases."""
    decay_embeddings: bool = True
    """Whether embedding tables decay too."""

    def __post_init__(self) -> None:
        self._require(0 < self.lr < math.inf, "lr", "positive and finite", "1e-3")
        self._require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more, and finite", "0.1")
        self._check()

    @final
    def make(self, named_parameters: NamedParameters) -> Optimizer:
        """The optimizer over `named_parameters`, in one group that decays and one that doesn't.

        Args:
            named_parameters: bare name and parameter of what is trained; frozen ones are left out.

        Returns:
            An optimizer whose groups each have `lr`, `weight_decay` and `decays` (bool).

        Raises:
            ConfigError: nothing is to be trained; parameters are cut, and this optimizer needs whole ones.
        """
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                if not self.elementwise and _is_cut(parameter):
                    raise ConfigError(
                        f"{type(self).__name__}: it needs whole parameters, and this strategy cuts them. "
                        "Use optimizer=adamw, or strategy=ddp (optimizer)."
                    )
                groups[self._decays(name, parameter)].append(parameter)
        if not any(groups.values()):
            raise ConfigError(
                f"{type(self).__name__}: the model has no trainable parameter. "
                "Leave some weights unfrozen, or add adapters (model.lora)."
            )
        return self._make(
            [
                {"params": parameters, "weight_decay": self.weight_decay if decays else 0.0, "decays": decays}
                for decays, parameters in groups.items()
                if parameters
            ]
        )

    @property
    @abstractmethod
    def elementwise(self) -> bool:
        """Whether each number is updated from its own gradient and moments alone.

        If not, parameters mustn't be cut into flat pieces.
        """

    @property
    @abstractmethod
    def slots_per_parameter(self) -> float:
        """Moments kept for each trainable number; for predictions of memory."""

    @abstractmethod
    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The torch optimizer."""

    def _check(self) -> None:
        """Refuse fields out of range."""

    def _decays(self, name: str, parameter: nn.Parameter) -> bool:
        # ZeRO-3 empties a parameter and keeps its shape beside it.
        num_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        if num_dims < 2 or name.endswith("bias"):
            return False
        return self.decay_embeddings or not any(part in name.lower() for part in _EMBEDDINGS)

    def _require(self, holds: bool, key: str, what: str, example: str) -> None:
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}: {key}={getattr(self, key)} is not {what}. Try {example} (optimizer.{key})."
            )


@final
@dataclass(kw_only=True)
class AdamWOptimizer(AbstractOptimizer):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, algorithm 2."""

    weight_decay: float = 0.1
    """Share of each weight, times the rate, that a step takes off; never off norms and biases."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square."""

    def _check(self) -> None:
        self._require(0 <= self.beta1 < 1, "beta1", "in [0, 1)", "0.9")
        self._require(0 <= self.beta2 < 1, "beta2", "in [0, 1)", "0.95")
        self._require(0 < self.eps < math.inf, "eps", "positive and finite", "1e-8")

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def slots_per_parameter(self) -> float:
        return 2.0

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        return AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=_fusable(groups))


@final
@dataclass(kw_only=True)
class SGDOptimizer(AbstractOptimizer):
    """Stochastic gradient descent. Source: Sutskever et al. 2013 for (Nesterov's) momentum."""

    lr: float = 0.1
    """The learning rate; the schedule's factor multiplies it."""
    momentum: float = 0.0
    """Share of the last update that goes on."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def _check(self) -> None:
        self._require(0 <= self.momentum < 1, "momentum", "in [0, 1)", "0.9")
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "SGDOptimizer: nesterov=true needs momentum, which is 0. Set optimizer.momentum=0.9, "
                "or nesterov=false (optimizer.momentum)."
            )

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def slots_per_parameter(self) -> float:
        return 1.0 if self.momentum > 0 else 0.0

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        cut = any(_is_cut(parameter) for group in groups for parameter in group["params"])
        fused = _fusable(groups) and not cut  # torch has no fused SGD for DTensor
        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)


@final
@dataclass(kw_only=True)
class AdafactorOptimizer(AbstractOptimizer):
    """Second moments as a row and a column per matrix: far less memory than Adam's.

    Not element by element, so a strategy that cuts parameters flat can't use it.
    Source: Shazeer and Stern 2018, algorithm 5, as in torch.optim.
    """

    lr: float = 1e-2
    """The learning rate, relative to each parameter's own scale; the schedule's factor multiplies it."""
    beta2_decay: float = -0.8
    """The mean square forgets with step ** beta2_decay."""
    clip_threshold: float = 1.0
    """Largest root mean square of an update."""

    def _check(self) -> None:
        self._require(-math.inf < self.beta2_decay < 0, "beta2_decay", "negative and finite", "-0.8")
        self._require(1 <= self.clip_threshold < math.inf, "clip_threshold", "1 or more, and finite", "1.0")

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def slots_per_parameter(self) -> float:
        return 0.01  # a row and a column per matrix

    def _make(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, d=self.clip_threshold)


def _is_cut(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "placements")  # a DTensor, whose import costs more than this


def _fusable(groups: list[dict[str, Any]]) -> bool:
    """One kernel for all parameters: torch has it for floating-point numbers on these devices."""
    return all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for group in groups
        for parameter in group["params"]
    )


SCHEMAS: tuple[type, ...] = (AdamWOptimizer, SGDOptimizer, AdafactorOptimizer)
