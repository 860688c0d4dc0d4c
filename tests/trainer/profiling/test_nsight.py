"""What Nsight Systems is told, by a device that isn't there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.errors import ConfigError
from strategies.timing import phase
from trainer.metrics.clock import StepClock
from trainer.profiling.base import Window
from trainer.profiling.nsight import NsightProfiler


def world(device: str) -> Any:
    return SimpleNamespace(rank=0, size=1, device=torch.device(device))


def test_nsight_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs a CUDA device, and this run computes on cpu\. Use profiler=torch"):
        NsightProfiler().refuse_world(world("cpu"))
    NsightProfiler().refuse_world(world("cuda"))


def test_nsight_marks_its_steps_and_their_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        told.append(f"<{name}")
        yield
        told.append(f"{name}>")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: told.append("ON"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: told.append("OFF"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", named)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: told.append(f"<{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append(">"))
    said: list[str] = []
    clock = StepClock()
    window = Window(NsightProfiler(start=2, steps=2), world("cuda"), Path("run"), clock, said.append)
    window.begin(0, 10)
    for step in range(1, 5):
        with clock.measure("data"):
            pass
        with phase("forward"):
            pass
        window.advance(step)
    assert told == [
        *("wait", "ON", "<step 2", "<data", "data>", "<forward", "forward>"),
        *(">", "<step 3", "<data", "data>", "<forward", "forward>"),
        *(">", "<step 4", ">", "wait", "OFF"),
    ]
    assert "steps 2 to 3 were shown to Nsight Systems" in said[-1]
