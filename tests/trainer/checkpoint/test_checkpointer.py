"""Checkpoints in a folder and in a bucket: complete or not there, kept in number, and unable to run code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError
from strategies.world import World
from tests.trainer.checkpoint.conftest import Unreliable
from trainer.checkpoint import Checkpointer, Checkpoints, Found, Record
from trainer.checkpoint.config import Best, Sharing
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import AbstractStore, FolderStore, HashedFile, open_store

WORLD = World(device=torch.device("cpu"), store=dist.HashStore())


def record(step: int, **more: Any) -> Record:
    return Record(progress={"step": step, "samples": 8 * step}, world_size=1, **more)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weights/a.b": torch.full((3, 4), value), "optim/a.b/step": torch.tensor(value)}


def make(place: str | Path, heard: list[str] | None = None, **config: Any) -> Checkpointer:
    return Checkpointer(str(place), WORLD, Checkpoints(**config), warn=(heard if heard is not None else []).append)


def save(keeper: Checkpointer, step: int, value: float | None = None, **more: Any) -> None:
    keeper.save(tensors(float(step) if value is None else value), {}, record(step, **more))


def save_and_wait(keeper: Checkpointer, step: int) -> None:
    save(keeper, step)
    keeper.wait()


def steps(place: str | Path) -> list[int]:
    """Those of which any file is there."""
    return sorted({int(name[5:13]) for name in open_store(str(place)).sizes() if name.startswith("step-")})


def newest(keeper: Checkpointer) -> Found:
    found = keeper.newest()
    assert found is not None
    return found


def content(keeper: Checkpointer, found: Found) -> float:
    into = tensors(-1.0)
    keeper.load(found, into)
    (value,) = {float(value.mean()) for value in into.values()}
    return value


@pytest.mark.parametrize("async_save", [False, True])
def test_load_after_save_gives_the_same(place: str, async_save: bool) -> None:
    keeper = make(place, async_save=async_save)
    keeper.save(tensors(2.5), {"local/0/rng": torch.arange(3)}, record(7))
    keeper.wait()
    saved = keeper.finished()
    assert saved is not None
    assert saved.step == 7
    assert saved.stall_s < saved.seconds if async_save else saved.stall_s == saved.seconds
    found = newest(keeper)
    assert found.address == f"{place}/step-00000007"
    assert saved.num_bytes == found.manifest.size == sum(open_store(place).sizes(found.folder).values())
    assert keeper.read_record(found) == record(7)
    assert content(keeper, found) == 2.5
    assert keeper.shapes(found) == {"local/0/rng": (3,), "optim/a.b/step": (), "weights/a.b": (3, 4)}


def test_save_leaves_nothing_but_whats_in_the_manifest(place: str) -> None:
    keeper = make(place)
    save(keeper, 3)
    store, found = open_store(place), newest(keeper)
    names = {f"step-00000003/{name}" for name in found.manifest.files} | {"step-00000003/manifest.json"}
    assert set(store.sizes()) == names
    assert {name.rpartition("/")[2] for name in names} == {"manifest.json", "state.json", ".metadata", "__0_0.distcp"}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 2}, [9, 10]),
        ({"keep": 0}, list(range(1, 11))),
        ({"keep": 1, "keep_every": 4, "every": 1}, [4, 8, 10]),
        ({"keep": 1, "keep_best": "val_loss"}, [3, 10]),
        ({"keep": 2, "keep_best": "val_loss", "keep_best_mode": Best.max}, [1, 9, 10]),
    ],
)
def test_save_keeps_what_the_configuration_says(tmp_path: Path, config: dict[str, Any], kept: list[int]) -> None:
    keeper = make(tmp_path, **config)
    values = {1: 5.0, 2: float("nan"), 3: 0.5, 4: 2.0}  # the others weren't evaluated
    for step in range(1, 11):
        save(keeper, step, metrics={"val_loss": values[step]} if step in values else {})
    assert steps(tmp_path) == kept


def test_save_keeps_the_newest_in_a_bucket(s3: tuple[str, Unreliable]) -> None:
    keeper = make(s3[0], keep=2)
    for step in (1, 2, 10):
        save(keeper, step)
    assert steps(s3[0]) == [2, 10]


def test_save_same_step_again_replaces_it(place: str) -> None:
    keeper = make(place)
    save(keeper, 1, 1.0)
    first = newest(keeper)
    save(keeper, 1, 2.0)
    found = newest(keeper)
    assert content(keeper, found) == 2.0
    assert found.manifest.attempt != first.manifest.attempt
    assert not any(first.manifest.attempt in name for name in open_store(place).sizes())


def test_save_killed_before_the_marker_leaves_no_checkpoint(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    keeper = make(place, heard)
    save(keeper, 1)
    with monkeypatch.context() as patched:
        patched.setattr(type(open_store(place)), "publish", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(keeper, 2)
    assert steps(place) == [1, 2]
    assert newest(keeper).manifest.step == 1
    assert heard == ["damaged checkpoint: step-00000002 was never completed; going back to step-00000001"]
    save(keeper, 3)
    assert steps(place) == [1, 3], "what was left behind wasn't swept"


def _interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_newest_doesnt_count_what_isnt_complete(tmp_path: Path) -> None:
    keeper = make(tmp_path)
    assert keeper.newest() is None
    (tmp_path / "step-00000008").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "manifest.json").write_text("{}")
    assert keeper.newest() is None
    save(keeper, 9)
    assert (tmp_path / "notes" / "manifest.json").is_file()


@pytest.mark.parametrize("async_save", [False, True])
def test_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    keeper = make(tmp_path, async_save=async_save, keep=1)
    save(keeper, 1)
    keeper.wait()
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match="No space left") as caught:
            save_and_wait(keeper, 2)
    assert "\n" not in str(caught.value)
    assert steps(tmp_path) == [1]
    save(keeper, 3)
    keeper.wait()
    assert steps(tmp_path) == [3]


def test_save_that_was_published_stays_when_a_rank_dies_right_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, real = make(tmp_path), FolderStore.publish

    def last_deed(*args: Any) -> None:
        real(*args)
        raise RuntimeError("gloo: Connection reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "publish", last_deed)
        with pytest.raises(RuntimeError, match="reset by peer"):
            save_and_wait(keeper, 1)
    assert content(make(tmp_path), newest(make(tmp_path))) == 1.0


@pytest.mark.parametrize(("phase", "stays"), [("together", False), ("collect", True)])
def test_save_of_another_machine_removes_only_what_nobody_can_have_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, stays: bool
) -> None:
    keeper = make(tmp_path)
    keeper._world = dataclasses.replace(keeper._world, rank=1)  # its folder is its own, the manifest is rank 0's
    monkeypatch.setattr(Checkpointer, "_share", lambda self, tensors: dict(tensors))
    monkeypatch.setattr(World, phase, _full)
    with pytest.raises(TrainingError, match="full"):
        save_and_wait(keeper, 1)
    assert steps(tmp_path) == [1] * stays


def test_async_save_that_fails_is_reported_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make(tmp_path, async_save=True)
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "publish", _full)
        save(keeper, 1)
        while keeper._outcome is None:
            time.sleep(0.01)
    assert keeper.finished() is None
    with pytest.raises(TrainingError, match="step-00000001 can't be written: full"):
        save(keeper, 2)


def _full(*args: object) -> None:
    raise OSError("full")


def test_async_save_keeps_what_was_there_at_the_call(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make(place, async_save=True)
    live, notes = tensors(1.0), {"hook": {"seen": [1]}}
    for step in (1, 2):  # the second time into the same copies
        keeper.save(live, {}, record(step, hooks=notes))
        for value in live.values():
            value.fill_(2.0 * step)
        notes["hook"]["seen"].append(2)
        keeper.wait()
        assert content(keeper, newest(keeper)) == max(1.0, 2.0 * (step - 1))
        assert keeper.read_record(newest(keeper)).hooks["hook"]["seen"] == [1, 2][:step]
    assert keeper.staged_bytes == 13 * 4


@pytest.mark.parametrize(
    ("into", "words"),
    [
        ({"weights/other": torch.zeros(3, 4)}, "weights/other"),
        ({"weights/a.b": torch.zeros(5)}, r"\(5,\)"),
    ],
)
def test_load_of_another_model_names_what_differs(tmp_path: Path, into: dict[str, torch.Tensor], words: str) -> None:
    keeper = make(tmp_path)
    save(keeper, 1)
    with pytest.raises(ConfigError, match=words):
        keeper.load(newest(keeper), into)


def damage(store: AbstractStore, name: str, how: str) -> None:
    data = bytearray(store.read(name))
    if how == "missing":
        store.remove([name])
        return
    if how == "flipped":
        data[len(data) // 2] ^= 1
    with store.create(name) as file:
        file.write({"torn": data[:-3], "empty": b"", "flipped": data, "longer": data + b"x"}[how])


@pytest.mark.parametrize("how", ["torn", "empty", "flipped", "missing", "longer"])
@pytest.mark.parametrize("which", ["manifest.json", "state.json", ".metadata", "__0_0.distcp"])
def test_newest_goes_back_past_a_damaged_one_and_says_so(place: str, which: str, how: str) -> None:
    heard: list[str] = []
    keeper = make(place, heard, keep=2)
    for step in (1, 2):
        save(keeper, step)
    store = open_store(place)
    (name,) = (name for name in store.sizes("step-00000002") if name.endswith(f"/{which}"))
    damage(store, name, how)
    again = make(place, heard, keep=2)
    assert content(again, newest(again)) == 1.0
    (line,) = heard
    assert "step-00000002" in line
    assert "going back to step-00000001" in line
    if (which, how) != ("manifest.json", "missing"):
        with pytest.raises(ConfigError, match="step-00000002"):
            again.at(2)
        save(again, 3)
        assert steps(place) == [1, 2, 3], "the last good one must stay, and the damaged one doesn't count"
    save(again, 4)
    assert steps(place) == [3, 4] if how != "missing" or which != "manifest.json" else [1, 4]


def test_newest_where_none_is_whole_is_refused(place: str) -> None:
    keeper = make(place)
    for step in (1, 2):
        save(keeper, step)
    store = open_store(place)
    for name in store.sizes():
        if name.endswith("distcp"):
            damage(store, name, "flipped")
    before = store.sizes()
    with pytest.raises(ConfigError, match=r"none in .* is whole: step-00000002/.*; step-00000001/.*run\.dir") as caught:
        make(place).newest()
    assert "\n" not in str(caught.value)
    assert store.sizes() == before


def test_newest_of_files_mixed_from_two_steps_is_refused(tmp_path: Path) -> None:
    keeper = make(tmp_path)
    for step in (1, 2):
        save(keeper, step)
    (tmp_path / "step-00000002" / "manifest.json").write_bytes((tmp_path / "step-00000001/manifest.json").read_bytes())
    assert content(keeper, newest(keeper)) == 1.0


def test_newest_without_verify_reads_no_file(tmp_path: Path) -> None:
    keeper = make(tmp_path, verify=False)
    save(keeper, 1)
    (shard,) = tmp_path.rglob("*.distcp")
    damage(FolderStore(tmp_path), str(shard.relative_to(tmp_path)), "flipped")
    assert newest(keeper).manifest.step == 1
    with pytest.raises(ConfigError, match="SHA-256"):
        make(tmp_path).newest()


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    save(make(tmp_path), 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    raw = json.loads(path.read_text())
    raw["content"]["format"] = 99
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="format 99, this version reads 2"):
        make(tmp_path).newest()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "other/state.json"])
def test_manifest_that_names_files_elsewhere_is_refused(name: str) -> None:
    evil = Manifest(step=1, attempt="aa", saved_at=0.0, files={name: (1, "00")})
    with pytest.raises(ValueError, match="outside"):
        Manifest.parse(evil.to_bytes(), 1)


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_load_of_an_evil_index_with_the_right_digest_runs_nothing(tmp_path: Path) -> None:
    keeper = make(tmp_path / "checkpoints", verify=False)
    save(keeper, 1)
    found = newest(keeper)
    (index,) = tmp_path.rglob(".metadata")
    index.write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"mkdir has no place in a checkpoint's index") as caught:
        keeper.load(found, tensors())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_store_that_fails_every_third_request_loses_nothing(s3: tuple[str, Unreliable]) -> None:
    address, server = s3
    keeper = make(address, keep=2)
    server.failing, failed = 3, server.failed
    for step in (1, 2, 3):
        save(keeper, step)
    assert content(keeper, newest(keeper)) == 3.0
    assert steps(address) == [2, 3]
    assert server.failed - failed > 10, "the server didn't fail"


def test_store_that_is_gone_is_one_line(s3: tuple[str, Unreliable]) -> None:
    with pytest.raises(ConfigError, match=r"can't be written: .*checkpoint\.folder") as caught:
        make("s3://no-such-bucket/run")
    assert "\n" not in str(caught.value)


def test_store_of_an_unknown_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.folder"):
        make("nowhere://bucket/run")


def test_store_file_knows_its_size_and_digest(place: str) -> None:
    store = open_store(place)
    with store.create("a/b") as file:
        assert isinstance(file, HashedFile)
        for part in (b"some", b" ", memoryview(b"bytes")):
            file.write(part)
    assert (file.size, file.hexdigest()) == (10, store.digest("a/b"))
    assert store.read("a/b") == b"some bytes"
    assert store.sizes() == {"a/b": 10}
    store.remove(["a/b", "a/c"])
    assert store.sizes() == {}


@pytest.mark.parametrize(
    "config",
    [
        {"every": 0},
        {"keep": -1},
        {"keep_every": 0},
        {"every": 3, "keep_every": 4},
        {"every": None, "keep_every": 4},
        {"keep": 0, "keep_best": "val_loss"},
        {"keep_best_mode": Best.max},
        {"folder": "s3://bucket/run", "sharing": Sharing.local},
    ],
)
def test_checkpoints_out_of_range_or_in_contradiction_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\(checkpoint\."):
        Checkpoints(**config)
