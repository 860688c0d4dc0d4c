"""Sharded tensors: each rank writes its shard once, and any number of ranks reads the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.backends import GlooBackend
from strategies.ddp import DDPStrategy
from strategies.testing import Workers
from strategies.world import World
from trainer.checkpoint import Checkpointer, Checkpoints, Record
from trainer.checkpoint.metadata import index_of

WHOLE = torch.arange(35.0).view(7, 5)


def laid_out(world: World, how: str, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how == "plain":
        return value.clone()
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (2, world.size // 2))
        return distribute_tensor(value.clone(), mesh, [Replicate(), Shard(0)])
    return distribute_tensor(value.clone(), init_device_mesh("cpu", (world.size,)), [Shard(int(how))])


def save(folder: str, how: str, async_save: bool) -> int:
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend())
    try:
        keeper = Checkpointer(folder, world, Checkpoints(async_save=async_save))
        tensors = {"weights/a": laid_out(world, how, WHOLE), "weights/b": torch.ones(3)}
        keeper.save(tensors, {f"local/{world.rank}/rng": torch.full((2,), world.rank)}, Record(
            progress={"step": 1}, world_size=world.size
        ))  # fmt: skip
        keeper.wait()
        saved = keeper.finished()
        assert saved is not None
        return saved.num_bytes
    finally:
        strategy.close()


def load(folder: str, how: str) -> dict[str, Any]:
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend())
    try:
        keeper = Checkpointer(folder, world, Checkpoints())
        found = keeper.newest()
        assert found is not None
        into = {"weights/a": laid_out(world, how, torch.zeros_like(WHOLE)), "weights/b": torch.zeros(3)}
        into["local/1/rng"] = torch.zeros(2)
        keeper.load(found, into)
        whole = into["weights/a"]
        full = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        return {"a": full.tolist(), "b": into["weights/b"].tolist(), "rng": into["local/1/rng"].tolist()}
    finally:
        strategy.close()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize(("how", "size"), [("0", 2), ("1", 3), ("hybrid", 4)])
def test_sharded_save_is_read_by_any(  # a shard written twice, or not at all, would be refused by `index_of`
    workers: Workers, tmp_path: Path, how: str, size: int, async_save: bool
) -> None:
    workers.run(save, size, str(tmp_path), how, async_save, timeout=60)
    for other, ranks in (("plain", 1), ("0", 3), ("1", 2), ("hybrid", 2)):
        for answer in workers.run(load, ranks, str(tmp_path), other, timeout=60):
            assert answer == {"a": WHOLE.tolist(), "b": [1.0] * 3, "rng": [1.0] * 2}


def test_sharded_index_with_a_part_missing_is_refused(workers: Workers, tmp_path: Path) -> None:
    part = {"a": {"dtype": "float32", "size": [4, 2], "chunks": [[[0, 0], [2, 2], "__0_0.distcp", 0, 10]]}}
    with pytest.raises(ValueError, match="'a'"):
        index_of([part])
    other = {"a": {**part["a"], "chunks": [[[2, 0], [2, 2], "__1_0.distcp", 0, 10]]}}
    assert index_of([part, other])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_is_read_by_torch_itself(workers: Workers, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    workers.run(save, 2, str(tmp_path), "0", False, timeout=60)
    (folder,) = tmp_path.glob("step-*/*/tensors")
    into = {"weights/a": torch.zeros_like(WHOLE)}
    dcp.load(into, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert torch.equal(into["weights/a"], WHOLE)
