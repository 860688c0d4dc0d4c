"""Buffers that training changes on each rank by itself, such as batch norm's running mean."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


def statistics_of(model: nn.Module) -> list[Tensor]:
    """All buffers of a model with batch norm; none of any other."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return list(model.buffers())
    return []


def take_over(statistics: list[Tensor]) -> None:
    """Those of rank 0, as under ddp: what is evaluated and saved is one model. Collective."""
    for buffer in statistics:
        dist.broadcast(buffer, 0)
