"""What is particular to DDP: settings, hooks, buckets, unused parameters, and what it measures."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from strategies import _testing_jobs as jobs
from strategies import _testing_model as little
from strategies._testing_jobs import Rig
from strategies._testing_model import Job
from strategies._traffic import buckets
from strategies.backends import AutoBackend, GlooBackend
from strategies.base import Batch, LossTerms, ModelSpec, Plan, Strategy, Weights, WorldSpec
from strategies.ddp import CommunicationHook, DDPStrategy
from strategies.errors import ConfigError
from strategies.testing import Recipe, Workers


class DDP(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(find_unused=unused)


class CarelessDDP(Recipe):
    """Doesn't look for unused parameters, whatever the model has."""

    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy()


class HalfPrecisionHookDDP(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(hook=CommunicationHook.fp16)


class PowerSGDHookDDP(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(hook=CommunicationHook.powersgd, powersgd_start=3, powersgd_rank=2)


# What the workers run.


def wrapped_job(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    strategy = DDPStrategy(**settings)
    strategy.connect(GlooBackend())
    plan = job.plan(1)
    model, _ = strategy.setup(
        little.make_model(False), little.weights(False), lambda named: little.make_optimizer(job, named), plan
    )
    assert isinstance(model, DistributedDataParallel)
    strategy.close()
    return {
        "static": model.static_graph,
        "view": model.gradient_as_bucket_view,
        "unused": model.find_unused_parameters,
        "buffers": getattr(model, "forward_sync_buffers", getattr(model, "broadcast_buffers", None)),
    }


def gradients_live_in_buckets() -> bool:
    rig = Rig(DDP, Job(numbers="fp32", accumulation=2))
    rig.train(jobs.Record(snapshot=jobs.empty_snapshot()))
    rig.strategy.forward_backward(rig.model, rig.batches(0), little.loss, 10.0)
    storages = {p.grad.untyped_storage().data_ptr() for p in rig.model.parameters() if p.grad is not None}
    return len(storages) == 1


def count_reductions(accumulation: int, bucket_mb: float) -> list[int]:
    """All-reduces of gradients in each of 6 steps."""
    strategy = DDPStrategy(bucket_mb=bucket_mb)
    world = strategy.connect(GlooBackend())
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    plan = Plan(micro_batch=2, accumulation=accumulation)
    wrapped, optimizer = strategy.setup(
        model, Weights(seed=0, fill=lambda _: None), lambda named: SGD([p for _, p in named], lr=0.1), plan
    )
    assert isinstance(wrapped, DistributedDataParallel)
    seen: list[int] = []

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations with classes, not strings
        seen[-1] += 1
        work = dist.all_reduce(bucket.buffer().div_(world.size), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)
    batches = [Batch(inputs={"input": torch.randn(2, 64)}, labels=torch.zeros(2), num_targets=2)] * accumulation
    for _ in range(6):
        seen.append(0)
        strategy.forward_backward(
            wrapped, batches, lambda outputs, batch: LossTerms(loss=outputs.square().sum()), 4.0 * accumulation
        )
        strategy.step(wrapped, optimizer)
    strategy.close()
    return seen


class Gated(nn.Module):
    """One layer, and another that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y + self.extra(y) if use else y


def gated_job(uses: list[bool], find_unused: bool) -> list[float]:
    """Steps of a model of which each rank uses what `uses` says, by micro-batch and rank."""
    strategy = DDPStrategy(find_unused=find_unused)
    world = strategy.connect(GlooBackend(timeout_s=30.0))
    torch.manual_seed(0)
    plan = Plan(micro_batch=1, accumulation=2)
    model, optimizer = strategy.setup(
        Gated(), Weights(seed=0, fill=lambda _: None), lambda named: SGD([p for _, p in named], lr=0.1), plan
    )
    mine = uses[2 * world.rank : 2 * world.rank + 2]
    batches = [Batch(inputs={"x": torch.ones(1, 4), "use": use}, labels=torch.zeros(1), num_targets=1) for use in mine]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    try:
        for _ in range(2):
            strategy.forward_backward(model, batches, lambda y, _: LossTerms(loss=y.square().sum()), 4.0)
            strategy.step(model, optimizer)
    finally:
        end = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert find_unused or torch.equal(start, end), "a step was taken with gradients that weren't averaged"
    strategy.close()
    return end.tolist()  # type: ignore[no-any-return]


def refused_hook_job(backend: GlooBackend | AutoBackend) -> tuple[str, bool]:
    try:
        DDPStrategy(hook=CommunicationHook.bf16).connect(backend)
    except ConfigError as error:
        return str(error), dist.is_initialized()
    return "", True


def refused_static_graph_job() -> str:
    try:
        Rig(StaticDDP, Job(accumulation=2))
    except ConfigError as error:
        return str(error)
    return ""


class StaticDDP(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(static_graph=True)


@contextlib.contextmanager
def slow_rank(rank: int, seconds: float) -> Iterator[None]:
    if rank == 1:
        time.sleep(seconds)
    yield


def communication_job(accumulation: int) -> tuple[list[float | None], list[float]]:
    """What 25 steps report, with a late rank in the 20th; and what asking costs."""
    rig = Rig(DDP, Job(numbers="fp32", accumulation=accumulation, steps=(0,)))
    reported, costs = [], []
    for step in range(25):
        rig.world.barrier()
        batches = rig.batches(step)
        with slow_rank(rig.world.rank, 0.3 if step == 20 else 0.0):
            rig.strategy.forward_backward(rig.model, batches, little.loss, 10.0)
        reported.append(rig.strategy.step(rig.model, rig.optimizer).communication_s)
        start = time.thread_time()
        rig.strategy._communication(rig.model)  # type: ignore[attr-defined]
        costs.append(time.thread_time() - start)
    rig.strategy.close()
    return reported, costs


def batch_norm_job(steps: int) -> list[list[float]]:
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend())
    model, optimizer = strategy.setup(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        Weights(seed=0, fill=lambda _: None),
        lambda named: SGD([p for _, p in named], lr=0.1),
        Plan(micro_batch=4),
    )
    for step in range(steps):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + world.rank))
        batch = Batch(inputs={"input": x}, labels=torch.zeros(4), num_targets=4)
        strategy.forward_backward(model, [batch], lambda y, _: LossTerms(loss=y.square().sum()), 8.0)
        strategy.step(model, optimizer)
    wanted = Batch(inputs={"input": torch.ones(2, 4)}, labels=torch.zeros(2), num_targets=2)
    outputs: list[list[float]] = strategy.predict(model, wanted).tolist()
    strategy.close()
    return outputs


# Settings.


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bucket_mb": 0.0}, "bucket_mb=0.0"),
        ({"bucket_mb": -1.0}, "bucket_mb=-1.0"),
        ({"static_graph": True, "find_unused": True}, "contradict"),
        ({"powersgd_rank": 0}, "powersgd_rank=0"),
        ({"powersgd_start": 1}, "powersgd_start=1"),
    ],
    ids=str,
)
def test_ddp_with_a_bad_setting_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        DDPStrategy(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", [GlooBackend(), AutoBackend()], ids=["gloo", "auto"])
def test_bf16_hook_on_gloo_is_refused_before_any_collective(
    workers: Workers, backend: GlooBackend | AutoBackend
) -> None:
    if backend.torch_name() != "gloo":
        pytest.skip("auto is NCCL here")
    answers = workers.run(refused_hook_job, 2, backend)
    assert answers[0] == answers[1]
    assert "hook=bf16 needs NCCL" in answers[0][0]
    assert not answers[0][1]


def test_static_graph_with_accumulation_is_refused_on_all_ranks(workers: Workers) -> None:
    answers = workers.run(refused_static_graph_job, 2)
    assert answers[0] == answers[1]
    assert "static_graph=true can't accumulate (2 micro-batches" in answers[0]


@pytest.mark.parametrize(
    ("accumulation", "settings", "static"),
    [
        (1, {}, True),
        (2, {}, False),
        (1, {"find_unused": True}, False),
        (1, {"static_graph": False}, False),
    ],
    ids=str,
)
def test_graph_is_static_only_without_accumulation(
    workers: Workers, accumulation: int, settings: dict[str, Any], static: bool
) -> None:
    (found,) = workers.run(wrapped_job, 1, Job(accumulation=accumulation), settings)
    assert found["static"] is static
    assert found["view"] is True
    assert found["unused"] is settings.get("find_unused", False)
    assert found["buffers"] is False


def test_gradients_are_views_of_buckets(workers: Workers) -> None:
    assert workers.run(gradients_live_in_buckets, 2) == [True, True]


class Begun(nn.Module):
    """A learned first position before each sample, and places for all, as an image model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, 1, 4))
        self.places = nn.Parameter(torch.ones(1, 4, 4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first.expand(len(values), -1, -1), values], dim=1) + self.places


def step_with_odd_strides() -> tuple[list[str], list[torch.Tensor]]:
    """Warnings and gradients of a step of two micro-batches."""
    strategy = DDPStrategy()
    strategy.connect(GlooBackend())
    plan = Plan(micro_batch=1, accumulation=2)
    model, _ = strategy.setup(Begun(), little.weights(False), lambda named: SGD([p for _, p in named]), plan)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for number in range(2):
                with contextlib.nullcontext() if number else model.no_sync():  # type: ignore[operator]
                    model(torch.full((1, 3, 4), 1.0 + number)).square().sum().backward()
    finally:
        torch.set_warn_always(False)
    gradients = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    strategy.close()
    return [str(each.message) for each in found], gradients


def test_gradients_of_size_one_have_the_strides_of_buckets_and_memory_of_their_own(workers: Workers) -> None:
    plain = Begun()
    for number in range(2):
        plain(torch.full((1, 3, 4), 1.0 + number)).square().sum().backward()
    for said, gradients in workers.run(step_with_odd_strides, 2):
        assert said == []
        for mine, value in zip(gradients, plain.parameters(), strict=True):
            torch.testing.assert_close(mine, value.grad)


def test_batch_norm_buffers_follow_rank_zero(workers: Workers) -> None:
    # Rank 0's statistics of the last step haven't travelled yet; those before have.
    ranks = workers.run(batch_norm_job, 2, 3)
    spread = max(abs(a - b) for one, two in zip(*ranks, strict=True) for a, b in zip(one, two, strict=True))
    assert spread < 0.2


# Synchronisation.


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_bucket_is_reduced_once_per_step(workers: Workers, accumulation: int) -> None:
    one = workers.run(count_reductions, 2, accumulation, 25.0)
    assert one == [[1] * 6] * 2 or one == [[2, *[1] * 5]] * 2, one  # torch's first bucket is small until rebuilt
    # 64 x 65 numbers of 4 bytes are 16.25 KiB: a layer fills a bucket of 15 KiB with its weight.
    many = workers.run(count_reductions, 2, accumulation, 15 / 1024)
    assert many[0] == many[1]
    assert many[0][2:] == [many[0][2]] * 4
    assert 4 <= many[0][2] <= 8


@pytest.mark.parametrize("recipe", [HalfPrecisionHookDDP, PowerSGDHookDDP], ids=["fp16", "powersgd"])
def test_compression_hook_trains_on_gloo(workers: Workers, recipe: type[Recipe]) -> None:
    job = Job(rule="sgd", lr=0.2, numbers="fp32", steps=tuple(range(12)), accumulation=2)
    plain = workers.run(jobs.train_job, 2, DDP, job)[0]
    packed = workers.run(jobs.train_job, 2, recipe, job)
    assert packed[0].losses == packed[1].losses
    assert packed[0].digest == packed[1].digest
    assert packed[0].losses != plain.losses, "the hook isn't in force"
    assert packed[0].losses == pytest.approx(plain.losses, abs=0.2)
    if recipe is PowerSGDHookDDP:
        # Until powersgd_start the averages are plain.
        assert packed[0].losses[:3] == pytest.approx(plain.losses[:3], abs=1e-6)


# Parameters that a step doesn't use.


def test_unused_parameter_without_static_graph_names_the_setting_on_all_ranks(workers: Workers) -> None:
    job = Job(unused=True, accumulation=2, steps=(0, 1))
    outcomes = workers.outcomes(jobs.train_job, 2, CarelessDDP, job)
    for outcome in outcomes:
        assert outcome.error == "ConfigError", outcome
        assert "strategy.find_unused=true" in outcome.message
        assert "'spare' has none" in outcome.message
        assert "\n" not in outcome.message


def test_unused_parameter_with_static_graph_is_left_alone(workers: Workers) -> None:
    job = Job(rule="adamw", lr=0.01, unused=True)
    record = workers.run(jobs.train_job, 2, CarelessDDP, job)[0]
    wanted = workers.run(jobs.reference_job, 1, job)[0]
    assert record.losses == pytest.approx(wanted.losses, abs=1e-9)
    assert torch.equal(record.full["spare"], wanted.full["spare"])


@pytest.mark.parametrize(
    "uses",
    [[True, False, True, False], [True, True, True, False], [False, False, True, True], [False] * 4],
    ids=["not in the last", "not in one rank's last", "not on one rank", "nowhere"],
)
def test_gradient_missing_in_the_last_micro_batch_is_told_before_the_step(workers: Workers, uses: list[bool]) -> None:
    outcomes = workers.outcomes(gated_job, 2, uses, False)
    for outcome in outcomes:
        assert outcome.error == "ConfigError", outcome
        assert "strategy.find_unused=true" in outcome.message
        assert "\n" not in outcome.message


@pytest.mark.parametrize(
    "uses",
    [[True, False, True, False], [True, True, True, False], [False, False, True, True], [False] * 4],
    ids=["not in the last", "not in one rank's last", "not on one rank", "nowhere"],
)
def test_find_unused_trains_whatever_is_used(workers: Workers, uses: list[bool]) -> None:
    found = workers.run(gated_job, 2, uses, True)
    assert found[0] == found[1]
    torch.manual_seed(0)
    model = Gated()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for use in uses:
            (model(torch.ones(1, 4), use).square().sum() / 4).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    wanted = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    assert found[0] == pytest.approx(wanted, abs=1e-6)


# What it measures and predicts.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_communication_is_the_wait_for_a_late_rank(workers: Workers, accumulation: int) -> None:
    reported, costs = workers.run(communication_job, 2, accumulation)[0]
    assert None not in reported, "a step wasn't measured"
    others = sorted(reported[5:20])
    assert reported[20] > 0.2
    assert others[len(others) // 2] < 0.1
    assert sorted(costs)[len(costs) // 2] < 1e-4, "asking costs more than 0.1 ms"


def test_buckets_are_those_of_torch() -> None:
    tensors = [torch.empty(numbers, device="meta") for numbers in (7, 300, 1, 50, 400, 2, 90, 90, 90, 5)]
    for limits in ([400], [100, 800], [1, 1200], [10**9]):
        theirs, _ = dist._compute_bucket_assignment_by_size(tensors, limits)
        ours = buckets(tensors, [each.nbytes for each in tensors], limits)
        assert [[each.numel() for each in bucket] for bucket in ours] == [
            [tensors[index].numel() for index in bucket] for bucket in theirs
        ]


def test_footprint_of_ddp_counts_buckets() -> None:
    model = ModelSpec(num_parameters=100 * 2**20, num_trainable=100 * 2**20)
    plan = Job(numbers="fp32").plan(1)
    world = WorldSpec(size=8, local_size=8)
    (reduction,) = DDPStrategy(bucket_mb=25.0).footprint(model, world, plan).collectives
    assert (reduction.kind, reduction.count, reduction.ranks) == ("all_reduce", 16, 8)
    assert reduction.payload_bytes == 25 * 2**20
    (halved,) = DDPStrategy(hook=CommunicationHook.fp16).footprint(model, world, plan).collectives
    assert halved.payload_bytes == reduction.payload_bytes // 2
    assert replace(reduction, payload_bytes=0) == replace(halved, payload_bytes=0)
