"""Horovod: the contract, what gradients may look like on their way, and every launcher on the same script."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import SGD

from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, ModelSpec, Plan, Strategy, Weights, WorldSpec
from strategies.ddp import DDPStrategy
from strategies.errors import ConfigError
from strategies.horovod import Compression, HorovodStrategy, Reduction
from strategies.testing import Job, StrategyContract, Workers, check_refusals, check_tensors
from strategies.world import Launch
from tests.strategies.test_surprises import Normalised, Surprising, made, reference, trained

pytestmark = [
    pytest.mark.horovod,
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod isn't installed (scripts/install_horovod.sh)"),
]


def test_footprint_fuses_gradients_up_to_a_size() -> None:
    with torch.device("meta"):
        spec = ModelSpec.of(nn.Sequential(*(nn.Linear(4000, 4000, bias=False) for _ in range(3))))
    world, plan, size = WorldSpec(size=4, local_size=4), Plan(micro_batch=1), 4 * 4000 * 4000

    def sent(compression: Compression) -> list[tuple[int, int]]:
        found = HorovodStrategy(compression=compression).footprint(spec, world, plan).collectives
        return [(each.payload_bytes, each.count) for each in found]

    assert sent(Compression.none) == [(2 * size, 1), (size + 3 * 4, 1)]
    assert sent(Compression.fp16) == [(3 * size // 2 + 3 * 2, 1)]


class TestHorovod(StrategyContract):
    sizes = (2, 3)

    def make(self, *, unused: bool = False) -> Strategy:
        return HorovodStrategy()


class Summing(StrategyContract):
    """Not collected: the contract's means of comparison, for a strategy that adds up what is divided already."""

    def make(self, *, unused: bool = False) -> Strategy:
        return HorovodStrategy(op=Reduction.sum)


class Compressing(StrategyContract):
    """The same, for fp16 on the way."""

    def make(self, *, unused: bool = False) -> Strategy:
        return HorovodStrategy(compression=Compression.fp16)


def test_sum_means_the_same_gradient(workers: Workers) -> None:
    Summing().check_against_reference(workers, 3, Job(rule="sgd", lr=0.5, accumulation=2, unused=True))


def test_compressed_gradients_are_near_and_not_the_same(workers: Workers) -> None:
    contract, job = Compressing(), Job(rule="sgd", lr=0.5, numbers="fp32")
    record, wanted = contract.train(workers, 2, job), contract.reference(workers, job)
    check_tensors(record.full, wanted.full, 2.0**-10, "weight")
    with pytest.raises(AssertionError):
        check_tensors(record.full, wanted.full, 1e-6, "weight")


@pytest.mark.parametrize("size", [2, 3])
def test_surprising_model_trains_as_in_one_process(workers: Workers, size: int) -> None:
    wanted = reference()
    for found in workers.run(trained, size, HorovodStrategy, {}, Surprising, timeout=60):
        found.pop("seen")
        check_tensors(found, wanted, 1e-9, "tensor")
        for name in ("layers.0.spare", "layers.1.up.weight", "norm.bias"):
            assert torch.equal(found[name], dict(made(Surprising).named_parameters())[name]), f"{name} was touched"


def test_batch_norm_keeps_the_statistics_of_rank_0_as_under_ddp(workers: Workers) -> None:
    [found, *_] = workers.run(trained, 2, HorovodStrategy, {}, Normalised, timeout=60)
    [wanted, *_] = workers.run(trained, 2, DDPStrategy, {}, Normalised, timeout=60)
    check_tensors(found, wanted, 1e-9, "tensor")


# What is refused.


def refused(settings: dict[str, Any], lame: int) -> str:
    """What this rank hears; rank `lame` has no Horovod."""
    launch = Launch.from_env()
    hidden = {name: None for name in sys.modules if name.partition(".")[0] == "horovod"} | {"horovod": None}
    strategy = HorovodStrategy(**settings)
    try:
        with mock.patch.dict(sys.modules, hidden if launch.rank == lame else {}):
            strategy.connect(GlooBackend(timeout_s=30))
        model = nn.Linear(2, 2).to(torch.bfloat16)
        weights = Weights(seed=0, fill=lambda module: None)
        strategy.setup(model, weights, lambda named: SGD([value for _, value in named]), Plan(micro_batch=1))
    except ConfigError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


@pytest.mark.parametrize(
    ("settings", "lame", "words"),
    [
        ({}, 0, "Horovod isn't installed"),
        ({}, 1, "scripts/install_horovod.sh"),
        ({"op": Reduction.adasum}, -1, "op=adasum needs MPI"),
        ({}, -1, "'weight' is torch.bfloat16"),
        ({"commit_every": 10}, -1, "horovodrun -np 2 --min-np 1 --host-discovery-script"),
    ],
    ids=["uninstalled", "uninstalled_on_rank_1", "adasum_without_mpi", "bf16_parameters", "not_elastic"],
)
def test_what_it_cant_do_is_refused_on_all_ranks(
    workers: Workers, settings: dict[str, Any], lame: int, words: str
) -> None:
    heard = workers.run(refused, 2, settings, lame, timeout=60)
    check_refusals(heard)
    assert words in heard[0]


def start_again(name: str) -> list[str]:
    """What is said of three starts, the last two with a variable that Horovod survives only once."""
    said = []
    for value in (None, "2", "2"):
        if value is not None:
            os.environ[name] = value
        strategy = HorovodStrategy()
        try:
            strategy.connect(GlooBackend(timeout_s=30))
            said.append("")
        except ConfigError as error:
            said.append(str(error))
        finally:
            strategy.close()
    return said


def test_second_start_that_horovod_would_die_of_is_refused(workers: Workers) -> None:
    for first, *others in workers.run(start_again, 2, "HOROVOD_CYCLE_TIME", timeout=60):
        assert first == ""
        assert all("HOROVOD_CYCLE_TIME=2" in other for other in others)


# What goes wrong on the way.


def fail_in_backward(lame: int) -> str:
    """One rank fails while the others wait for its gradients."""
    strategy = HorovodStrategy()
    world = strategy.connect(GlooBackend(timeout_s=60))

    def loss(outputs: Any, batch: Any) -> LossTerms:
        if world.rank == lame:
            raise ValueError("stumbled")
        return LossTerms(loss=outputs.sum())

    model = nn.Linear(2, 2)
    weights = Weights(seed=0, fill=lambda module: None)
    wrapped, _ = strategy.setup(model, weights, lambda named: SGD([value for _, value in named]), Plan(micro_batch=1))
    batch = Batch(inputs={"input": torch.ones(1, 2)}, labels=torch.zeros(1, dtype=torch.long), num_targets=1)
    try:
        strategy.forward_backward(wrapped, [batch], loss, float(world.size))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        strategy.close()
    return ""


def test_rank_that_fails_is_heard_by_those_that_wait_for_it(workers: Workers) -> None:
    heard = workers.run(fail_in_backward, 3, 1, timeout=30)
    assert heard[1] == "ValueError: stumbled"
    for other in (heard[0], heard[2]):
        assert other.startswith("RuntimeError: Horovod: the connection between the ranks broke")


def begin_and_leave() -> None:
    """A strategy that nobody closes."""
    HorovodStrategy().connect(GlooBackend(timeout_s=30))


def test_strategy_that_nobody_closed_doesnt_keep_the_next_one_from_starting(workers: Workers) -> None:
    workers.run(begin_and_leave, 2)
    Summing().check_against_reference(workers, 3, Job(rule="sgd", lr=0.5))
