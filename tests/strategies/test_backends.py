"""Backends, and the connection between ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from strategies.backends import AutoBackend, Backend, GlooBackend, NCCLBackend, connect_ranks
from strategies.errors import ConfigError
from strategies.testing import Workers
from strategies.world import Launch


@dataclass(kw_only=True)
class PartlyMissingBackend(GlooBackend):
    lame: int = 0

    def device(self, launch: Launch) -> torch.device:
        if launch.rank >= self.lame:
            raise ConfigError(f"rank {launch.rank} has no device")
        return super().device(launch)


def connect_twice() -> list[list[float]]:
    """A second connection must not meet the first one's keys."""
    sums = []
    for _ in range(3):
        world = connect_ranks(GlooBackend(timeout_s=20.0))
        assert world.checkpoint is not None
        value = torch.ones(1)
        dist.all_reduce(value, group=world.checkpoint)
        dist.all_reduce(value)
        sums.append([*world.reduce([1.0]), float(value)])
        dist.destroy_process_group()
    return sums


def connect_after_refusal() -> tuple[str, float]:
    message = ""
    try:
        connect_ranks(PartlyMissingBackend(lame=1))
    except ConfigError as error:
        message = str(error)
    assert not dist.is_initialized()
    return message, connect_ranks(GlooBackend()).reduce([1.0])[0]


def described(interface: str | None) -> tuple[tuple[int, ...], str, str | None]:
    world = connect_ranks(GlooBackend(interface=interface))
    numbers = (world.rank, world.local_rank, world.size, world.local_size, world.data_rank, world.data_size)
    return numbers, dist.get_backend(), os.environ.get("NCCL_SOCKET_IFNAME")


def connect_alone() -> int:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    world = connect_ranks(GlooBackend())
    world.barrier()
    assert world.gather("x") == ["x"]
    return world.size


@pytest.mark.parametrize("backend", [GlooBackend, NCCLBackend, AutoBackend])
def test_backend_with_a_bad_timeout_is_refused(backend: type[Backend]) -> None:
    with pytest.raises(ConfigError, match="timeout_s=0"):
        backend(timeout_s=0)


def test_nccl_with_more_ranks_than_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert NCCLBackend().device(Launch(local_size=1)) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="2 processes on this machine, but 1 CUDA devices"):
        NCCLBackend().device(Launch(rank=1, local_rank=1, size=2, local_size=2))


@pytest.mark.parametrize("there", [True, False])
def test_auto_follows_the_machine(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert AutoBackend().torch_name() == ("nccl" if there else "gloo")
    assert AutoBackend().device(Launch()).type == ("cuda" if there else "cpu")


def test_connection_can_be_made_again(workers: Workers) -> None:
    assert workers.run(connect_twice, 3) == [[[3.0, 9.0]] * 3] * 3


def test_refusal_names_the_lowest_rank_and_doesnt_spoil_the_next_connection(workers: Workers) -> None:
    assert workers.run(connect_after_refusal, 3) == [("rank 1 has no device", 3.0)] * 3


def test_connected_world_counts_processes_and_machines(workers: Workers) -> None:
    answers = workers.run(described, 4, None, local_size=2)
    assert [numbers for numbers, _, _ in answers] == [(rank, rank % 2, 4, 2, rank, 4) for rank in range(4)]
    assert {name for _, name, _ in answers} == {"gloo"}


def test_interface_reaches_both_libraries(workers: Workers) -> None:
    assert {name for _, _, name in workers.run(described, 2, "lo")} == {"=lo"}


def test_process_alone_connects_without_an_address(workers: Workers) -> None:
    assert workers.run(connect_alone, 1) == [1]
