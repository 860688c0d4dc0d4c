"""The search for a micro-batch, on a pretended machine."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import trainer.micro_batch as module
from strategies.backends import GlooBackend
from strategies.ddp import DDPStrategy
from strategies.errors import ConfigError, TrainingError
from strategies.testing import Workers
from strategies.world import World
from trainer.micro_batch import find_micro_batch

WORLD = World(device=torch.device("cpu"), store=dist.HashStore())


class Machine:
    """Memory that grows by `each` bytes per sample on top of `base`, and fails beyond `limit`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: float, each: float, limit: float) -> None:
        self.base, self.each, self.limit = base, each, limit
        self.peak = base
        self.tried: list[int] = []
        monkeypatch.setattr(module, "_used_bytes", lambda world: self.peak)
        monkeypatch.setattr(module, "_limit_bytes", lambda world: limit / module.SAFE)

    def attempt(self, size: int) -> None:
        self.tried.append(size)
        self.peak = max(self.peak, self.base + self.each * size)
        if self.peak > 1.5 * self.limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(("share", "best"), [(64, 8), (12, 6), (7, 7), (1, 1)])
def test_find_takes_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch, share: int, best: int) -> None:
    machine = Machine(monkeypatch, base=20, each=10, limit=100)
    assert find_micro_batch(WORLD, share, machine.attempt, reserve_bytes=0) == best
    assert all(share % size == 0 for size in machine.tried)


def test_find_doesnt_try_what_it_can_tell_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, base=20, each=10, limit=100)
    find_micro_batch(WORLD, 64, machine.attempt, reserve_bytes=0)
    assert 16 not in machine.tried


def test_find_keeps_room_for_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, base=20, each=10, limit=100)
    assert find_micro_batch(WORLD, 64, machine.attempt, reserve_bytes=45) == 2


def test_find_nothing_fits_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, base=200, each=10, limit=100)
    with pytest.raises(ConfigError, match="not even one sample"):
        find_micro_batch(WORLD, 8, machine.attempt, reserve_bytes=0)


def test_find_other_errors_are_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, base=20, each=10, limit=100)

    def broken(size: int) -> None:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch(WORLD, 8, broken, reserve_bytes=0)


def search(shared: bool) -> str:
    """Two ranks, of which the second has memory for three samples."""
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend(timeout_s=6))

    def attempt(size: int) -> None:
        if size > 3 and world.rank == 1:
            raise MemoryError
        if shared:
            dist.all_reduce(torch.zeros(1))

    try:
        with mock.patch.object(module, "_PATIENCE_S", 1.0), mock.patch.object(module, "_used_bytes", return_value=0.0):
            return str(find_micro_batch(world, 12, attempt, reserve_bytes=0))
    except (TrainingError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        strategy.close()


def test_find_takes_what_fits_on_every_rank(workers: Workers) -> None:
    assert workers.run(search, 2, False, timeout=60) == ["3", "3"]


def test_find_ends_where_the_others_wait_for_a_rank_without_memory(workers: Workers) -> None:
    first, second = workers.run(search, 2, True, timeout=60)
    assert first.startswith("RuntimeError")  # its connection to the other is gone
    assert second.startswith("TrainingError: Trainer: rank 1 ran out of memory while it tried a micro-batch of 4")
    assert "trainer.micro_batch=3" in second
