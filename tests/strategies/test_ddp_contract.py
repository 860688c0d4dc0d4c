"""Distributed data parallel: the contract."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.testing import StrategyContract


class TestDDP(StrategyContract):
    sizes = (1, 2, 3, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(find_unused=unused)
