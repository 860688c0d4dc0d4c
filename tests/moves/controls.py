"""What a move could lose: each is taken out of a checkpoint on purpose, and the comparison must tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.world import World
from tests.faults.compare import last_checkpoint
from tests.moves.job import GLOBAL_BATCH
from trainer.checkpoint import Checkpointer, Checkpoints, Record

Change = Callable[[dict[str, Tensor], Record], Record]
"""Changes the tensors of a checkpoint in place; gives what else is to be written."""


def _zero(tensors: dict[str, Tensor], *slots: str) -> None:
    for name, value in tensors.items():
        if name.startswith("optim/") and name.rpartition("/")[2] in slots:
            value.zero_()


def moments(tensors: dict[str, Tensor], record: Record) -> Record:
    """Adam's moments are zero, as in a fresh optimizer."""
    _zero(tensors, "exp_avg", "exp_avg_sq")
    return record


def first_moments(tensors: dict[str, Tensor], record: Record) -> Record:
    """The mean of gradients is zero; its square isn't."""
    _zero(tensors, "exp_avg")
    return record


def counts(tensors: dict[str, Tensor], record: Record) -> Record:
    """Adam corrects its bias as at the first step."""
    _zero(tensors, "step")
    return record


def one_moment(tensors: dict[str, Tensor], record: Record) -> Record:
    """Of one parameter alone."""
    name = next(name for name in sorted(tensors) if name.startswith("optim/") and name.endswith("exp_avg"))
    tensors[name].zero_()
    return record


def shards(tensors: dict[str, Tensor], record: Record) -> Record:
    """The two halves of a weight have changed places."""
    name = max((name for name in tensors if name.startswith("weights/")), key=lambda name: tensors[name].numel())
    tensors[name].copy_(tensors[name].roll(tensors[name].shape[0] // 2, 0))
    return record


def average(tensors: dict[str, Tensor], record: Record) -> Record:
    """The running average begins again."""
    for name in tensors:
        if name.startswith("average/"):
            tensors[name].copy_(tensors[f"weights/{name.removeprefix('average/')}"])
    return record


def position(tensors: dict[str, Tensor], record: Record) -> Record:
    """A global batch comes twice."""
    return replace(record, progress={**record.progress, "samples": record.progress["samples"] - GLOBAL_BATCH})


def streams(tensors: dict[str, Tensor], record: Record) -> Record:
    """Random streams begin anew, as at another world size; shows where there is dropout."""
    return replace(record, world_size=record.world_size + 1)


CONTROLS: dict[str, Change] = {
    change.__name__: change
    for change in (moments, first_moments, one_moment, counts, shards, average, position, streams)
}


def lose(run: Path, change: Change) -> None:
    """Write the newest checkpoint of `run` anew, without something."""
    world = World(device=torch.device("cpu"), store=dist.HashStore())
    keeper = Checkpointer(str(run / "checkpoints"), world, Checkpoints(keep=0))
    found = keeper.newest()
    assert found is not None
    _, tensors = last_checkpoint(run)
    keeper.save(tensors, {}, change(tensors, keeper.read_record(found)))
    keeper.close()
