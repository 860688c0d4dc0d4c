"""Fully sharded data parallelism in every shape: the contract."""

from __future__ import annotations

import pytest

from strategies.base import Strategy
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.testing import StrategyContract
from strategies.world import Launch
from trainer.config import compose, made


class Cut(StrategyContract):
    forward_is_collective = True


class TestFSDPFull(Cut):
    sizes = (1, 2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(wrap=["Linear"])


class TestFSDPGradOp(Cut):
    sizes = (2, 3, 4)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.grad_op, wrap_parameters=100, reduce_every_micro_batch=False)


class TestFSDPHybrid(Cut):
    """One group: 1x2, 1x3, 1x4."""

    sizes = (2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.hybrid, wrap=["Linear"], prefetch=2)


class TestMiCS(Cut):
    """Groups: 2x1, 1x3, 2x2."""

    sizes = (2, 3, 4)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        degree = {3: 3, 4: 2}.get(Launch.from_env().size, 1)
        return FSDPStrategy(sharding=Sharding.hybrid, hybrid_shard_degree=degree)


class TestFSDPHybridOfOne(Cut):
    """Groups: 4x1."""

    sizes = (4,)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.hybrid, replicas=4, wrap=["Linear"])


class TestFSDPReplicate(Cut):
    sizes = (2, 3, 4)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.replicate)


class TestFSDPPartlyCutBetween(Cut):
    sizes = (4,)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(reshard_after_forward=2, wrap=["Linear"])


class TestFSDPOffload(Cut):
    sizes = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(cpu_offload=True)


@pytest.mark.parametrize(
    ("choice", "sharding"),
    [
        ("fsdp_full", Sharding.full),
        ("fsdp_grad_op", Sharding.grad_op),
        ("fsdp_hybrid", Sharding.hybrid),
        ("mics", Sharding.hybrid),
        ("fsdp_replicate", Sharding.replicate),
    ],
)
def test_choices_of_the_configuration_are_these_shapes(choice: str, sharding: Sharding) -> None:
    assert made(compose([f"strategy={choice}"]).strategy) == FSDPStrategy(sharding=sharding)
