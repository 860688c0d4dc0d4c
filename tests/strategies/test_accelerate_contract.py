"""Accelerate: the contract."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from strategies.accelerate import AccelerateStrategy
from strategies.backends import Backend
from strategies.base import Strategy
from strategies.testing import StrategyContract
from strategies.world import World

FILES = Path(__file__).parent / "accelerate_configs"


class AsOnGPUs(AccelerateStrategy):
    """Accelerate makes plain data parallelism of FSDP where there are no GPUs: it is told that there are some.

    What cuts the model and what trains it is Accelerate's and torch's own, over Gloo.
    """

    def connect(self, backend: Backend) -> World:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        def on_cpu(state: PartialState) -> None:
            state.device = torch.device("cpu")

        found = ("gloo", DistributedType.MULTI_GPU)
        with (
            mock.patch.object(PartialState, "_prepare_backend", return_value=found),
            mock.patch.object(PartialState, "set_device", on_cpu),
        ):
            return super().connect(backend)


class TestAccelerate(StrategyContract):
    sizes = (1, 2)

    def make(self, *, unused: bool = False) -> Strategy:
        return AccelerateStrategy(find_unused=unused)


class TestAccelerateFSDP(StrategyContract):
    sizes = (2,)
    forward_is_collective = True

    def make(self, *, unused: bool = False) -> Strategy:
        return AsOnGPUs(config_path=str(FILES / "fsdp.yaml"))
