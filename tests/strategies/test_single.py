"""One process alone."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.single import SingleStrategy
from strategies.testing import StrategyContract


class TestSingle(StrategyContract):
    sizes = (1,)
    refused_sizes = (2,)
    accumulations = (1, 2, 4)

    def make(self, *, unused: bool = False) -> Strategy:
        return SingleStrategy()
