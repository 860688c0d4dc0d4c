"""Checkpoints on disk: complete or not there, kept in number, and unable to run code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError
from strategies.world import World
from trainer.checkpoint import Checkpointer, Checkpoints, Record

WORLD = World(device=torch.device("cpu"), store=dist.HashStore())


def record(step: int) -> Record:
    return Record(progress={"step": step, "samples": 8 * step}, world_size=1)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weights/a.b": torch.full((3, 4), value), "optim/a.b/step": torch.tensor(value)}


def test_load_after_save_gives_the_same(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    keeper.save(tensors(2.5), record(7))
    newest = keeper.newest()
    assert newest == tmp_path / "step-00000007"
    assert keeper.read_record(newest) == record(7)
    into = tensors(0.0)
    keeper.load(newest, into)
    assert all(bool((value == 2.5).all()) for value in into.values())
    assert keeper.names(newest) == sorted(into)


def test_save_keeps_the_newest(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints(keep=2))
    for step in (1, 2, 10):
        keeper.save(tensors(), record(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


def test_save_same_step_again_replaces_it(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    keeper.save(tensors(1.0), record(1))
    keeper.save(tensors(2.0), record(1))
    into = tensors(0.0)
    keeper.load(tmp_path / "step-00000001", into)
    assert float(into["optim/a.b/step"]) == 2.0
    assert len(list(tmp_path.iterdir())) == 1


def test_newest_doesnt_count_what_isnt_complete(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    assert keeper.newest() is None
    (tmp_path / "step-00000009.partial").mkdir()
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "notes").mkdir()
    assert keeper.newest() is None


def test_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    keeper.save(tensors(), record(1))
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left") as caught:
        keeper.save(tensors(), record(2))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("into", "words"),
    [
        ({"weights/other": torch.zeros(3, 4)}, "weights/other"),
        ({"weights/a.b": torch.zeros(5)}, r"\(5,\)"),
    ],
)
def test_load_of_another_model_names_what_differs(tmp_path: Path, into: dict[str, torch.Tensor], words: str) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    keeper.save(tensors(), record(1))
    with pytest.raises(ConfigError, match=words):
        keeper.load(tmp_path / "step-00000001", into)


def test_read_record_of_a_later_format_is_refused(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, WORLD, Checkpoints())
    keeper.save(tensors(), record(1))
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="99"):
        keeper.read_record(path.parent)


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("damage", ["evil", "torn", "empty", "missing"])
def test_load_damaged_index_is_refused_and_runs_nothing(tmp_path: Path, damage: str) -> None:
    keeper = Checkpointer(tmp_path / "checkpoints", WORLD, Checkpoints())
    keeper.save(tensors(), record(1))
    newest = keeper.newest()
    assert newest is not None
    index = newest / "tensors" / ".metadata"
    data = index.read_bytes()
    if damage == "missing":
        index.unlink()
    else:
        index.write_bytes({"evil": pickle.dumps(_Evil(tmp_path / "ran")), "torn": data[:-9], "empty": b""}[damage])
    with pytest.raises(ConfigError, match=r"index|read") as caught:
        keeper.load(newest, tensors())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", [{"every": 0}, {"keep": -1}])
def test_checkpoints_out_of_range_is_refused(config: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\."):
        Checkpoints(**config)
