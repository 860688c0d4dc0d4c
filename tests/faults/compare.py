"""Whether two runs learned the same: rows of `metrics.jsonl`, and every tensor of the last checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies.world import World
from trainer.checkpoint import Checkpointer, Checkpoints, Found
from trainer.checkpoint.metadata import IndexReader
from trainer.metrics.jsonl import read

_CLOCKED = ("_s", "_mib", "slowest_rank", "straggle")


def differences(run: Path, whole: Path, tolerance: float = 0.0) -> list[str]:
    """What of `run` isn't as in `whole`; empty: all is.

    Args:
        run: a run's folder.
        whole: of the uninterrupted run.
        tolerance: 0: bit for bit, weights, moments and random streams too; else how far losses may be apart.
    """
    mine, theirs = _rows(run), _rows(whole)
    if [row["step"] for row in mine] != [row["step"] for row in theirs]:
        return [f"steps of metrics.jsonl are {[row['step'] for row in mine]}"]
    found = []
    for row, wanted in zip(mine, theirs, strict=True):
        names = row.keys() | wanted.keys()
        unlike = {name for name in names if not _same(row.get(name), wanted.get(name), name, tolerance)}
        found += [f"step {row['step']}: {name} {row.get(name)!r}, not {wanted.get(name)!r}" for name in sorted(unlike)]
    if tolerance == 0:
        found += _tensor_differences(last_checkpoint(run), last_checkpoint(whole))
    return found + strays(run)


def last_checkpoint(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and tensors of the newest checkpoint, verified."""
    world = World(device=torch.device("cpu"), store=dist.HashStore())
    keeper = Checkpointer(str(run / "checkpoints"), world, Checkpoints())
    found = keeper.newest()
    assert found is not None, f"{run} has no checkpoint"
    tensors = _empty(found)
    keeper.load(found, tensors)
    return found.manifest.step, tensors


def strays(run: Path) -> list[str]:
    """Files in the folders of checkpoints that no manifest knows: a finished run has swept them."""
    world = World(device=torch.device("cpu"), store=dist.HashStore())
    keeper = Checkpointer(str(run / "checkpoints"), world, Checkpoints())
    known = set()
    for manifest in keeper._found.complete():
        known |= {f"{manifest.folder}/{name}" for name in (*manifest.files, "manifest.json")}
    there = {name for name in keeper._found.store.sizes() if name.startswith("step-")}
    return [f"{name} was left behind" for name in sorted(there - known)]


def reached(run: Path) -> int:
    """The last step in `metrics.jsonl`; 0: none."""
    return max((row["step"] for row in _rows(run)), default=0)


def saved(run: Path) -> int:
    """The newest step that has a manifest; 0: none."""
    found = (run / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)


def _rows(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.endswith(_CLOCKED)}
        for row in read(run / "metrics.jsonl")
    ]


def _same(mine: Any, theirs: Any, name: str, tolerance: float) -> bool:
    if mine is None or theirs is None or tolerance == 0 or "loss" not in name:
        near = tolerance > 0 and None not in (mine, theirs)
        return bool(mine == theirs or (near and math.isclose(mine, theirs, rel_tol=1e-3, abs_tol=1e-3)))
    return abs(mine - theirs) <= tolerance


def _empty(found: Found) -> dict[str, torch.Tensor]:
    stored = IndexReader(found.store, f"{found.folder}/tensors").read_metadata().state_dict_metadata
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}


def _tensor_differences(
    mine: tuple[int, dict[str, torch.Tensor]], theirs: tuple[int, dict[str, torch.Tensor]]
) -> list[str]:
    if mine[0] != theirs[0] or mine[1].keys() != theirs[1].keys():
        return [
            f"the last checkpoint is of step {mine[0]} with {len(mine[1])} tensors, not {theirs[0]}, {len(theirs[1])}"
        ]
    return [
        f"{name} of the last checkpoint differs"
        for name, value in mine[1].items()
        if not torch.equal(value.contiguous().view(-1).view(torch.uint8), theirs[1][name].view(-1).view(torch.uint8))
    ]
