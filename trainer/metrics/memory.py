"""How much memory a process has needed at most, and how much there is."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import psutil
import torch

MIB = 2**20


def peak_memory_mib(device: torch.device) -> float:
    """MiB: the most that tensors took on a CUDA device, elsewhere the most that this process held resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB on Linux


def host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Bytes that are left on this host, and that it has; within a container, to it and its limit.

    Args:
        cgroup: where the container's own group (version 2) is seen.
    """
    host = psutil.virtual_memory()
    available, size = float(host.available), float(host.total)
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        limit = float(int((cgroup / "memory.max").read_text()))
        words = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = next((float(word[1]) for word in words if word[0] == "inactive_file"), 0.0)
        used = float((cgroup / "memory.current").read_text()) - cached  # what the kernel gives back when it is needed
        available, size = min(available, max(0.0, limit - used)), min(size, limit)
    return available, size
