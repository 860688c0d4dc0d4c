"""metrics.jsonl: each step once, whatever happens in between."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics.jsonl import MetricsFile, read


def strict(path: Path) -> list[dict[str, object]]:
    """What a reader sees that takes nothing but standard JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def written(path: Path, until: int) -> Path:
    with MetricsFile(path) as file:
        for step in range(1, until + 1):
            file.write(step, {"loss": 1 / step, "tokens": step * 10})
    return path


def test_write_evaluation_after_its_step_goes_into_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(10, {"loss": 2.0})
        file.write(10, {"val_loss": 2.5})
        file.write(15, {"val_loss": 2.25})
        file.write(20, {"loss": 1.5})
    assert strict(path) == [
        {"step": 10, "loss": 2.0, "val_loss": 2.5},
        {"step": 15, "val_loss": 2.25},
        {"step": 20, "loss": 1.5},
    ]


def test_write_evaluation_after_resume_goes_into_the_line_before(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    with MetricsFile(path, step=3) as file:
        file.write(3, {"val_loss": 9.0})
    assert [line["step"] for line in strict(path)] == [1, 2, 3]
    assert strict(path)[-1]["val_loss"] == 9.0


def test_write_shorter_line_again_leaves_nothing_of_the_longer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(1, {"val_loss": 1.23456789})
        file.write(1, {"val_loss": 1.0})
    assert strict(path) == [{"step": 1, "val_loss": 1.0}]


def test_write_reaches_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(1, {"loss": 1.0})
        assert strict(path) == [{"step": 1, "loss": 1.0}]


def test_write_not_finite_stays_strict_json_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert strict(path) == [{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}]
    [line] = read(path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"]) == (math.inf, -math.inf)


def test_open_at_step_drops_later_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 9)
    with MetricsFile(path, step=6) as file:
        assert [line["step"] for line in strict(path)] == [1, 2, 3, 4, 5, 6]
        file.write(7, {"loss": 70.0})
    assert [line["loss"] for line in strict(path)][-2:] == [1 / 6, 70.0]


def test_open_fresh_run_drops_everything(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", 3)
    MetricsFile(path).close()
    assert path.read_text() == ""


def test_rewind_goes_back_and_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (1, 2, 3):
            file.write(step, {"loss": float(step)})
        file.rewind(1)
        file.write(2, {"loss": 20.0})
    assert [(line["step"], line["loss"]) for line in strict(path)] == [(1, 1.0), (2, 20.0)]


def test_write_earlier_step_replaces_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (1, 2, 3, 2):
            file.write(step, {"loss": float(step)})
    assert [line["step"] for line in strict(path)] == [1, 2]


def test_rewind_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "metrics.jsonl", 4)
    before = path.read_bytes()

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, step=2)
    assert path.read_bytes() == before


def test_read_without_file_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.jsonl") == []


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=400), garbage=st.binary(max_size=20), step=st.integers(0, 10))
def test_open_torn_file_keeps_whole_lines_and_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bytes, step: int
) -> None:
    path = written(tmp_path_factory.mktemp("torn") / "metrics.jsonl", 8)
    whole = path.read_bytes()
    survived = whole[:cut].count(b"\n")
    path.write_bytes(whole[:cut] + garbage.replace(b"\n", b""))
    with MetricsFile(path, step=step) as file:
        for later in range(step + 1, 12):
            file.write(later, {"loss": 1 / later, "tokens": later * 10})
    steps = [line["step"] for line in strict(path)]
    assert steps == sorted(set(steps))
    assert steps[: min(survived, step)] == list(range(1, min(survived, step) + 1))
    assert steps[len(steps) - (11 - step) :] == list(range(step + 1, 12))
