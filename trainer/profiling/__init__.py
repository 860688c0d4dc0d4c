"""Looking closely at a few steps: torch's profiler, ranges for Nsight Systems, and samples of communication."""

from __future__ import annotations

from trainer.profiling.base import AbstractProfiler
from trainer.profiling.nsight import NsightProfiler
from trainer.profiling.torch_profiler import TorchProfiler

__all__ = ["SCHEMAS", "AbstractProfiler"]

SCHEMAS: tuple[type, ...] = (TorchProfiler, NsightProfiler)
