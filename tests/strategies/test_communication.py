"""What a step's communication is said to be, where the truth is known."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from strategies._communication import CommunicationClock
from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, Plan, Strategy, Weights
from strategies.ddp import DDPStrategy
from strategies.fsdp import FSDPStrategy
from strategies.horovod import HorovodStrategy
from strategies.testing import Workers

HOROVOD = pytest.param(
    HorovodStrategy,
    id="horovod",
    marks=[
        pytest.mark.horovod,
        pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod isn't installed (scripts/install_horovod.sh)"),
    ],
)


class Sleep(torch.autograd.Function):
    """Computes nothing, in backward for a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None


class Slow(nn.Module):
    """In backward it sleeps, has the gradient of `last`, and sleeps again before that of `first`."""

    def __init__(self, before: float, after: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        hidden = Sleep.apply(self.first(x), self.after)
        outputs: Tensor = Sleep.apply(self.last(hidden), self.before)
        return outputs


def slow_job(make: Callable[[], Strategy], sleeps: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Exposed and whole communication of the third step; `sleeps` of each rank."""
    strategy = make()
    world = strategy.connect(GlooBackend(timeout_s=60.0))
    slow = Slow(0.0, 0.0)
    model, optimizer = strategy.setup(
        slow,
        Weights(seed=0, fill=lambda _: None),
        lambda named: SGD([value for _, value in named], lr=0.01),
        Plan(micro_batch=4),
    )
    for step in range(3):
        if step == 2:
            slow.before, slow.after = sleeps[world.rank]
        world.barrier()
        batch = Batch(inputs={"x": torch.ones(4, 64)}, labels=torch.zeros(4), num_targets=4)
        strategy.forward_backward(model, [batch], lambda y, _: LossTerms(loss=y.square().sum()), 8.0)
        info = strategy.step(model, optimizer)
    strategy.close()
    return info.communication_s, info.communication_total_s


def one_bucket_per_layer() -> Strategy:
    return DDPStrategy(bucket_mb=0.01)


@pytest.mark.parametrize("make", [pytest.param(one_bucket_per_layer, id="ddp"), HOROVOD])
def test_communication_behind_a_long_backward_is_hidden(workers: Workers, make: Callable[[], Strategy]) -> None:
    # Rank 1 has its first gradient 0.3 s after rank 0, which goes on with its backward for 0.8 s.
    [(exposed, whole), _] = workers.run(slow_job, 2, make, [(0.0, 0.8), (0.3, 0.5)])
    assert exposed is not None
    assert whole is not None
    assert whole > 0.25, "the gradient waited for the other rank"
    assert exposed < 0.15, "and nobody waited for it"


@pytest.mark.parametrize("make", [pytest.param(one_bucket_per_layer, id="ddp"), HOROVOD])
def test_communication_after_backward_is_exposed(workers: Workers, make: Callable[[], Strategy]) -> None:
    [(exposed, whole), late] = workers.run(slow_job, 2, make, [(0.0, 0.0), (0.0, 0.6)])
    assert exposed is not None
    assert whole is not None
    assert 0.45 < exposed <= whole < 1.5
    assert late[0] is not None
    assert late[0] < 0.3, "the late rank waited for nobody"


def test_sharded_communication_waits_in_line_on_cpu(workers: Workers) -> None:
    [(exposed, whole), _] = workers.run(slow_job, 2, FSDPStrategy, [(0.0, 0.0), (0.6, 0.0)])
    assert exposed is not None
    assert exposed > 0.45
    assert whole == pytest.approx(exposed, abs=0.05)


def alone(size: int, device: str = "cpu") -> CommunicationClock:
    return CommunicationClock(SimpleNamespace(size=size, device=torch.device(device)))  # type: ignore[arg-type]


def test_clock_leaves_torch_as_it_was() -> None:
    before, clock = dict(vars(dist)), alone(2)
    with clock, clock:
        assert dist.all_reduce is not before["all_reduce"]
    assert vars(dist) == before
    with contextlib.suppress(ValueError), clock:
        raise ValueError
    assert vars(dist) == before
    with alone(1), alone(2, "cuda"):
        assert vars(dist) == before


@pytest.mark.parametrize(
    ("clock", "wanted"), [(alone(1), (0.0, 0.0)), (alone(2, "cuda"), (None, None)), (alone(2), (0.0, 0.0))]
)
def test_take_says_what_is_known(clock: CommunicationClock, wanted: Any) -> None:
    with clock:
        pass
    assert clock.take() == wanted


def gloo_job() -> dict[str, Any]:
    """Collectives by name inside and outside of a step, and from another thread."""
    strategy = FSDPStrategy()
    world = strategy.connect(GlooBackend(timeout_s=60.0))
    clock, found = CommunicationClock(world), {}
    late = world.rank == 1

    def reduce_late(async_op: bool) -> Any:
        if late:
            time.sleep(0.3)
        return dist.all_reduce(torch.ones(1), async_op=async_op)

    reduce_late(False)
    found["outside"] = clock.take()
    with clock:
        thread = threading.Thread(target=reduce_late, args=(False,))
        thread.start()
        thread.join()
    found["thread"] = clock.take()
    with clock:
        reduce_late(False)
    found["blocking"] = clock.take()
    with clock:
        work = reduce_late(True)
        assert isinstance(work, dist.Work)
        time.sleep(0.6)
        assert work.wait() is True
        assert work.is_completed()
    found["hidden"] = clock.take()
    with clock:
        work = reduce_late(True)
        assert work.get_future().wait()[0].item() == 2
        work.wait()
    found["future"] = clock.take()
    del clock, work
    gc.collect()
    time.sleep(0.2)
    found["threads"] = [thread.name for thread in threading.enumerate() if "communication" in thread.name]
    strategy.close()
    return found


def test_collectives_are_measured_in_steps_and_on_their_thread_alone(workers: Workers) -> None:
    [found, _] = workers.run(gloo_job, 2)
    assert found["outside"] == found["thread"] == (0.0, 0.0)
    exposed, whole = found["blocking"]
    assert 0.25 < exposed == whole < 1
    exposed, whole = found["hidden"]
    assert exposed < 0.1
    assert 0.25 < whole < 0.5, "over when it was over, not when somebody asked"
    assert found["future"][1] > 0.25
    assert found["threads"] == [], "a thread stayed behind"
