"""Fully sharded data parallelism in every shape: the contract."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.testing import StrategyContract


class Cut(StrategyContract):
    forward_is_collective = True


class TestFSDPFull(Cut):
    sizes = (1, 2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(wrap=["Linear"])


class TestFSDPGradOp(Cut):
    sizes = (2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.grad_op, wrap_parameters=100, reduce_every_micro_batch=False)


class TestFSDPHybrid(Cut):
    sizes = (2, 4)
    refused_sizes = (3,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.hybrid, shard_size=2)


class TestFSDPReplicate(Cut):
    sizes = (2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.replicate)


class TestFSDPOffload(Cut):
    sizes = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(cpu_offload=True)
