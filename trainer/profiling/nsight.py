"""Ranges for Nsight Systems, which itself is started around the run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from strategies.errors import ConfigError
from strategies.world import World
from trainer.profiling.base import AbstractProfiler, Recording


@final
@dataclass(kw_only=True)
class NsightProfiler(AbstractProfiler):
    """Tells `nsys profile --capture-range=cudaProfilerApi` when to record, and marks each phase as an NVTX range."""

    has_device: ClassVar[bool] = True

    def refuse_world(self, world: World) -> None:
        super().refuse_world(world)
        if world.device.type != "cuda":
            raise ConfigError(
                f"NsightProfiler: profiler=nsight needs a CUDA device, and this run computes on {world.device.type}. "
                "Use profiler=torch (profiler, backend)."
            )

    def recording(self, world: World, folder: Path) -> Recording:
        return _NsightRecording()


class _NsightRecording(Recording):
    def mark(self, name: str) -> AbstractContextManager[Any]:
        marked: AbstractContextManager[Any] = torch.cuda.nvtx.range(name)
        return marked

    def start(self, first: int) -> None:
        torch.cuda.synchronize()  # what was queued before isn't of this step
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        self._first = self._next = first
        torch.cuda.nvtx.range_push(f"step {first}")  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._next += 1
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        torch.cuda.nvtx.range_push(f"step {self._next}")  # type: ignore[no-untyped-call]

    def stop(self, *, keep: bool) -> str:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # what is queued still belongs to it
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
        if self._next == self._first:
            return ""
        return (
            f"steps {self._first} to {self._next - 1} were shown to Nsight Systems; its report is where nsys was told "
            "to write it. Without nsys around the run, nothing was recorded (docs/profiling.md)"
        )
