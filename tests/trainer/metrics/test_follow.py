"""Reading along while a run writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trainer.metrics.follow import Follower
from trainer.metrics.jsonl import MetricsFile, read


def test_follower_has_at_every_moment_what_the_whole_file_says(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    follower.look()
    assert (follower.newest, follower.curves) == ({}, {})

    def agrees() -> None:
        follower.look()
        lines = read(path)
        names = {name for line in lines for name in line} - {"step"}
        assert follower.curves == {name: {line["step"]: line[name] for line in lines if name in line} for name in names}
        assert follower.newest == {name: value for line in lines for name, value in line.items()}

    with MetricsFile(path) as file:
        agrees()
        for step in (1, 2, 3):
            file.write(step, {"loss": 1.0 / step})
            agrees()
            file.write(step, {"val_loss": 2.0 / step})  # into the same line
            agrees()
        file.write(4, {"loss": 4.0})
        file.write(5, {"loss": 5.0})
        agrees()
        file.write(2, {"loss": 7.0})  # the run went back
        agrees()
    with path.open("ab") as torn:
        torn.write(b'{"step": 6, "lo')
        torn.flush()
        agrees()
        torn.write(b'ss": 6.0}\n')
        torn.flush()
        agrees()
    path.unlink()
    follower.look()
    assert follower.curves == {}


def test_follower_knows_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        file.write(1, {"loss": math.inf})
    follower = Follower(tmp_path / "m.jsonl")
    follower.look()
    assert follower.newest == {"step": 1, "loss": math.inf}


def test_follower_reads_only_what_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsFile(tmp_path / "m.jsonl") as file:
        follower = Follower(tmp_path / "m.jsonl")
        for step in range(1, 101):
            file.write(step, {"loss": 1.0})
        follower.look()
        taken: list[bytes] = []
        monkeypatch.setattr(follower, "_take", taken.append)
        file.write(101, {"loss": 1.0})
        follower.look()
    assert len(taken) == 2  # the last line may have grown
