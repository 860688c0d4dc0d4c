"""DeepSpeed's ZeRO: the contract."""

from __future__ import annotations

import importlib.util
import tempfile

import pytest

from strategies._nvme import file_system
from strategies.base import Strategy
from strategies.deepspeed import DeepSpeedStrategy, Offload
from strategies.testing import StrategyContract

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

ON_DISK = file_system(tempfile.gettempdir()) != "tmpfs"


class Zero(StrategyContract):
    exact = "fp32"
    forward_is_collective = True


class TestZero1(Zero):
    sizes = (1, 2)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=1)


class TestZero2(Zero):
    sizes = (2, 3)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=2)


class TestZero3(Zero):
    sizes = (2, 4)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3, persist_numbers=0)


class TestZero3Offload(Zero):
    sizes = (2,)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu)


@pytest.mark.skipif(not ON_DISK, reason="needs temporary files on a disk (TMPDIR)")
class TestZeroInfinity(Zero):
    sizes = (2,)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(
            stage=3,
            offload_optimizer=Offload.nvme,
            offload_parameters=Offload.nvme,
            sub_group_numbers=3000,
            persist_numbers=0,
        )


class TestZeroHpz(Zero):
    sizes = (4,)
    accumulations = (2,)

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3, hpz=True, hpz_size=2, persist_numbers=0)
