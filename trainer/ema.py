"""A running average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError


class WeightAverage:
    """Exponential moving average of a model's weights, under their canonical names.

    Works on whatever the strategy hands out: plain tensors or DTensor shards, each averaged where
    it lies, so no rank ever holds more of the average than of the weights.

    Source: Polyak and Juditsky 1992; exponential form as in Tarvainen and Valpola 2017, section 2.
    """

    def __init__(self, decay: float) -> None:
        """Make an average of nothing yet.

        Args:
            decay: in (0, 1): the share of the old average that stays at each update.

        Raises:
            ConfigError: `decay` is out of range.
        """
        if not 0 < decay < 1:
            raise ConfigError(f"WeightAverage: decay={decay} is not between 0 and 1. Try 0.999 (trainer.ema_decay).")
        self.decay = decay
        self._tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the current weights; the first time, the average is a copy of them.

        Args:
            weights: canonical name -> live tensor; the same names and shapes each time.
        """
        if not self._tensors:
            self._tensors = {name: _copy(value) for name, value in weights.items()}
            return
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, value in weights.items():
            if value.is_floating_point():
                averages.append(self._tensors[name])
                values.append(value.detach().to(self._tensors[name].dtype))
            else:  # a counter has no mean
                self._tensors[name].copy_(value)
        for left, right in _by_kind(averages, values):
            torch._foreach_lerp_(left, right, 1 - self.decay)

    @contextlib.contextmanager
    def swapped(
        self, weights: Mapping[str, Tensor], compute_with: Callable[[Mapping[str, Tensor]], None]
    ) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards, with bit for bit what it had before.

        Args:
            weights: canonical name -> tensor, as it is now; may be live.
            compute_with: makes the model compute with the tensors that it is given.
        """
        held = {name: value.detach().clone() for name, value in weights.items()}
        try:
            compute_with(self._tensors)
            yield
        finally:
            compute_with(held)

    def tensors(self) -> dict[str, Tensor]:
        """The average by canonical name, for a checkpoint; empty before the first update."""
        return dict(self._tensors)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; it is copied.

        Args:
            tensors: canonical name -> average.
        """
        self._tensors = {name: _copy(value) for name, value in tensors.items()}


def _copy(value: Tensor) -> Tensor:
    """At least fp32: in bf16, a thousandth of a weight is lost in rounding."""
    low = value.is_floating_point() and value.dtype.itemsize < torch.float32.itemsize
    return value.detach().to(torch.float32 if low else value.dtype, copy=True)


def _by_kind(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The foreach kernels want one type, device and dtype in a call."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for mine, theirs in zip(left, right, strict=True):
        mesh = getattr(mine, "device_mesh", None)
        group = groups.setdefault((type(mine), mesh, mine.device, mine.dtype), ([], []))
        group[0].append(mine)
        group[1].append(theirs)
    yield from groups.values()
