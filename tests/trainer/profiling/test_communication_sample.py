"""Communication on an accelerator, from kernels that are made up: there is none here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.metrics.clock import StepClock
from trainer.profiling.sample import CommunicationSample, communication_s

MS = 1_000_000
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], None),
        ([("gemm", 0, 10 * MS)], (0.0, 0.0)),
        ([(NCCL, 0, 10 * MS)], (0.010, 0.010)),
        ([("gemm", 0, 8 * MS), (NCCL, 2 * MS, 6 * MS)], (0.0, 0.004)),
        ([("gemm", 0, 8 * MS), (NCCL, 6 * MS, 11 * MS), ("adam", 12 * MS, 13 * MS)], (0.003, 0.005)),
        ([(NCCL, 0, 4 * MS), (NCCL, 2 * MS, 6 * MS), ("gemm", 5 * MS, 9 * MS)], (0.005, 0.006)),
        ([(NCCL, 0, 4 * MS), ("Memcpy HtoD (Pinned -> Device)", 0, 4 * MS)], (0.004, 0.004)),
        ([(NCCL, 0, 4 * MS), ("Memcpy DtoD (Device -> Device)", 0, 1 * MS)], (0.003, 0.004)),
    ],
)
def test_communication_is_what_no_kernel_covers(
    events: list[tuple[str, int, int]], wanted: tuple[float, float] | None
) -> None:
    found = communication_s(iter(events))
    assert found == (wanted if wanted is None else pytest.approx(wanted))


class Kernels:
    """torch.profiler.profile, on a device that isn't there."""

    made: int = 0
    events: list[Any]
    fails: str | None = None

    def __init__(self, **options: Any) -> None:
        assert options["activities"] == [torch.profiler.ProfilerActivity.CUDA], "operators cost more than kernels"
        Kernels.made += 1
        self.on = False
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: self.events))

    def start(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.on = True

    def stop(self) -> None:
        assert self.on
        self.on = False


def event(name: str, begin: int, end: int, *, on_device: bool = True, annotation: bool = False) -> Any:
    kinds = torch.autograd.DeviceType
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: begin,
        end_ns=lambda: end,
        device_type=lambda: kinds.CUDA if on_device else kinds.CPU,
        is_user_annotation=lambda: annotation,
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> type[Kernels]:
    monkeypatch.setattr(torch.profiler, "profile", Kernels)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Kernels.made, Kernels.fails = 0, None
    Kernels.events = [
        event(NCCL, 0, 4 * MS),
        event("gemm", 1 * MS, 3 * MS),
        event("cudaLaunchKernel", 0, 9 * MS, on_device=False),
        event("forward", 0, 9 * MS, annotation=True),
    ]
    return Kernels


def sample(device: str = "cuda", size: int = 2) -> tuple[CommunicationSample, StepClock, list[str]]:
    clock, said = StepClock(), list[str]()
    world: Any = SimpleNamespace(device=torch.device(device), size=size)
    return CommunicationSample(world, clock, said.append), clock, said


def watched(taken: CommunicationSample, kernels: type[Kernels], every: int | None, steps: int) -> list[int]:
    found = []
    for step in range(1, steps + 1):
        before = kernels.made
        with taken.around(every):
            pass
        if kernels.made > before:
            found.append(step)
    return found


def test_sample_watches_an_early_step_and_then_one_in_so_many(kernels: type[Kernels]) -> None:
    taken, clock, said = sample()
    assert watched(taken, kernels, 10, 31) == [5, 10, 20, 30]
    assert clock.sampled == pytest.approx((0.002, 0.004))
    assert said == []


@pytest.mark.parametrize(("device", "size", "every"), [("cpu", 2, 10), ("cuda", 1, 10), ("cuda", 2, None)])
def test_sample_is_off_where_nothing_is_to_be_found(
    kernels: type[Kernels], device: str, size: int, every: int | None
) -> None:
    taken, clock, _ = sample(device, size)
    assert watched(taken, kernels, every, 30) == []
    assert clock.sampled is None


def test_sample_gives_up_where_the_profiler_does(kernels: type[Kernels]) -> None:
    taken, clock, said = sample()
    kernels.fails = "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert watched(taken, kernels, 10, 30) == [5]
    assert clock.sampled is None
    assert said == ["communication isn't measured: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES (trainer.communication_every)"]


def test_sample_without_kernels_is_no_zero(kernels: type[Kernels]) -> None:
    taken, clock, said = sample()
    kernels.events = [event("cudaLaunchKernel", 0, MS, on_device=False)]
    assert watched(taken, kernels, 10, 30) == [5]
    assert clock.sampled is None
    assert "sees no kernels" in said[0]


def test_sample_of_a_step_that_fails_leaves_the_profiler_off(kernels: type[Kernels]) -> None:
    taken, clock, _ = sample()
    watched(taken, kernels, 10, 4)
    with pytest.raises(ValueError, match="mine"), taken.around(10):
        raise ValueError("mine")
    assert clock.sampled is None
