"""How much memory a process has needed at most."""

from __future__ import annotations

import resource
import sys

import torch

MIB = 2**20


def peak_memory_mib(device: torch.device) -> float:
    """MiB: the most that tensors took on a CUDA device, elsewhere the most that this process held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB on Linux
