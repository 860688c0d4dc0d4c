"""Machines without a common disk, and a bucket: the same promises as in one folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from strategies.testing import Workers
from tests.trainer.checkpoint.conftest import Unreliable
from tests.trainer.jobs import ROWS, curve, fit, fit_on_hosts, record_of
from trainer.checkpoint.store import open_store

KEYS = [*ROWS, "schedule=constant", "trainer.dropout=0.2", "checkpoint.every=3", "checkpoint.keep=2"]


def on_hosts(
    workers: Workers, folder: Path, *overrides: str, disks: tuple[str, ...] = ("a", "b"), steps: int = 10
) -> list[dict[str, Any]]:
    words = [*KEYS, f"trainer.max_steps={steps}", *overrides]
    places = [str(folder / disk) for disk in disks]
    answers: list[dict[str, Any]] = workers.run(
        fit_on_hosts, 2, str(folder / "run"), words, places, timeout=60, local_size=1
    )
    return answers


def whole(workers: Workers, folder: Path, *, steps: int = 13) -> list[dict[str, Any]]:
    workers.run(fit, 2, str(folder / "whole"), [*KEYS, f"trainer.max_steps={steps}"], "Rows", timeout=60)
    return curve(folder / "whole")


def train(workers: Workers, size: int, folder: Path, *overrides: str, **more: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = workers.run(
        fit, size, str(folder), [*KEYS, *overrides], "Rows", timeout=120, **more
    )
    return answers


def tensors_of(disk: Path, step: int) -> set[str]:
    return {path.name for path in disk.glob(f"step-{step:08d}/*/tensors/*")}


def learned(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Without evaluations: a run that was ended and raised has one where it ended first."""
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "samples")) for line in found]


@pytest.mark.parametrize("sharing", ["auto", "local"])
def test_hosts_each_keep_what_they_wrote_and_go_on_together(workers: Workers, tmp_path: Path, sharing: str) -> None:
    on_hosts(workers, tmp_path, f"checkpoint.sharing={sharing}")
    assert tensors_of(tmp_path / "a", 10) == {".metadata", "__0_0.distcp"}
    assert tensors_of(tmp_path / "b", 10) == {"__1_0.distcp"}
    for disk in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / disk).iterdir()) == ["step-00000009", "step-00000010"]
    on_hosts(workers, tmp_path, f"checkpoint.sharing={sharing}", steps=13)
    assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))


def test_hosts_that_change_places_go_on(workers: Workers, tmp_path: Path) -> None:
    on_hosts(workers, tmp_path)
    answers = on_hosts(workers, tmp_path, disks=("b", "a"), steps=13)
    assert answers[0]["progress"]["step"] == 13
    assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))
    on_hosts(workers, tmp_path, steps=15)  # each has some manifests now, and one of a step that both wrote
    assert record_of_disk(tmp_path / "a", 15)["progress"]["step"] == 15


def record_of_disk(disk: Path, step: int) -> dict[str, Any]:
    (disk / "run").mkdir(exist_ok=True)
    (disk / "run" / "checkpoints").symlink_to(disk)
    return record_of(disk / "run", step)


def test_hosts_where_one_has_an_empty_disk_go_back_no_further_than_they_must(workers: Workers, tmp_path: Path) -> None:
    on_hosts(workers, tmp_path)
    on_hosts(workers, tmp_path, steps=11)  # copies step 10 to both
    shutil.rmtree(tmp_path / "b" / "step-00000011")
    answers = on_hosts(workers, tmp_path, steps=13)
    assert answers[0]["progress"]["step"] == 13
    assert "going back to step-00000010" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("size", [1, 2])
def test_hosts_merged_by_an_upload_can_be_read_by_any(workers: Workers, tmp_path: Path, size: int) -> None:
    on_hosts(workers, tmp_path)
    for disk in ("a", "b"):
        shutil.copytree(tmp_path / disk, tmp_path / "merged", dirs_exist_ok=True)
    answers = train(workers, size, tmp_path / "run", f"checkpoint.folder={tmp_path / 'merged'}", "trainer.max_steps=13")
    assert answers[0]["progress"]["step"] == 13
    if size == 2:
        assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))


@pytest.mark.parametrize("stopped", ["a", "b"])
def test_hosts_of_which_one_stopped_uploading_fall_back(workers: Workers, tmp_path: Path, stopped: str) -> None:
    on_hosts(workers, tmp_path)
    for disk in ("a", "b"):
        shutil.copytree(tmp_path / disk, tmp_path / "merged", dirs_exist_ok=True)
    for path in (tmp_path / stopped / "step-00000010").rglob("*"):
        if path.is_file():
            (tmp_path / "merged" / path.relative_to(tmp_path / stopped)).unlink()
    train(workers, 2, tmp_path / "run", f"checkpoint.folder={tmp_path / 'merged'}", "trainer.max_steps=13")
    assert "going back to step-00000009" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))


def test_bucket_that_fails_every_third_request_saves_resumes_and_keeps(
    workers: Workers, tmp_path: Path, s3: tuple[str, Unreliable]
) -> None:
    address, server = s3
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    keys, background = (f"checkpoint.folder={address}",), "checkpoint.async_save=true"
    server.failing, failed = 3, server.failed
    train(workers, 2, tmp_path / "run", *keys, background, environment=environment)
    train(workers, 2, tmp_path / "run", *keys, "trainer.max_steps=13", environment=environment)
    assert server.failed > failed
    server.failing = 0
    assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))
    store = open_store(address)
    assert {name.partition("/")[0] for name in store.sizes()} == {"step-00000012", "step-00000013"}
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    train(workers, 1, tmp_path / "other", f"resume={address}/step-00000012", environment=environment)
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["step"] == 12


def test_bucket_with_a_damaged_checkpoint_falls_back(
    workers: Workers, tmp_path: Path, s3: tuple[str, Unreliable]
) -> None:
    address, _ = s3
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    train(workers, 2, tmp_path / "run", f"checkpoint.folder={address}", environment=environment)
    store = open_store(address)
    (name,) = (name for name in store.sizes("step-00000010") if name.endswith("__1_0.distcp"))
    store.publish(name, store.read(name)[:-1] + b"?")
    train(workers, 2, tmp_path / "run", f"checkpoint.folder={address}", "trainer.max_steps=13", environment=environment)
    assert "going back to step-00000009" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert learned(curve(tmp_path / "run")) == learned(whole(workers, tmp_path))
