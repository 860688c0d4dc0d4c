"""What a run notes of itself besides its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from strategies.errors import ConfigError
from trainer.metrics.base import AbstractLogger
from trainer.metrics.events import history, read_events
from trainer.metrics.jsonl import read
from trainer.observer import Observer
from trainer.progress import Progress

PARTS: Any = SimpleNamespace(
    prediction=None,
    spec=SimpleNamespace(num_parameters=10, num_trainable=10),
    plan=SimpleNamespace(micro_batch=1, accumulation=1, precision=SimpleNamespace(numbers="fp32")),
)


def world(rank: int = 0) -> Any:
    return SimpleNamespace(
        rank=rank,
        size=2,
        data_size=2,
        device=torch.device("cpu"),
        together=contextlib.nullcontext,
        reduce=lambda values, how: values,
        barrier=lambda: None,
    )


@contextlib.contextmanager
def started(folder: Path, step: int = 0, **more: Any) -> Iterator[Observer]:
    observer = Observer(folder, world(), {}, {}, "zero2")
    observer.open(Progress(step=step), PARTS, 20, ["seed: 0 -> 1"], **more)
    try:
        yield observer
    finally:
        observer.close()


def kinds(folder: Path) -> list[tuple[str, int | None]]:
    return [(each.kind, each.step) for each in history(read_events(folder))]


def test_open_notes_how_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    with started(tmp_path, 4, checkpoint="s3://bucket/step-00000004"):
        pass
    [event] = read_events(tmp_path)
    assert {key: event[key] for key in event if key not in ("time", "host")} == {
        "event": "start",
        "step": 4,
        "last_seen_step": 0,
        "checkpoint": "s3://bucket/step-00000004",
        "strategy": "zero2",
        "world_size": 2,
        "device": "cpu",
        "restarts": 3,
        "changes": ["seed: 0 -> 1"],
    }


def test_open_after_a_kill_notes_the_steps_that_are_cut(tmp_path: Path) -> None:
    with started(tmp_path) as observer:
        for step in range(1, 8):
            observer.advance(step)
            observer.log(Progress(step=step), {"loss": 1.0})
    with started(tmp_path, 5):
        assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert kinds(tmp_path) == [("start", 0), ("change", 0), ("kill", 7), ("resume", 5), ("change", 5)]


def test_close_after_an_error_notes_it_once_without_secrets(tmp_path: Path) -> None:
    with started(tmp_path) as observer:
        observer.advance(3)
        observer.close(ValueError("no access with api_key=abc123"))
        observer.close(ValueError("again"))
    event = read_events(tmp_path)[-1]
    assert (event["event"], event["step"], event["outcome"]) == ("end", 3, "failed")
    assert event["reason"] == "ValueError: no access with api_key=***"
    assert kinds(tmp_path)[2:] == [("failure", 3)]


@pytest.mark.parametrize(("stopped", "outcome"), [(True, "stopped"), (False, "finished")])
def test_finish_notes_the_end(tmp_path: Path, *, stopped: bool, outcome: str) -> None:
    with started(tmp_path) as observer:
        observer.advance(6)
        observer.finish(Progress(step=6), "enough", stopped=stopped)
        observer.close(RuntimeError("after the end"))
    event = read_events(tmp_path)[-1]
    assert (event["step"], event["outcome"], event["reason"]) == (6, outcome, "enough")


def test_events_of_a_run_are_noted_by_rank_0_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Observer(tmp_path, world(1), {}, {}, "ddp")
    other.fell_back("other rank")
    with started(tmp_path) as observer:
        observer.advance(2)
        observer.saved(2, seconds=2.5, stall_s=0.5, num_bytes=7)
        observer.continuity("the loss jumped")
        observer.rolled_back(Progress(step=1))
    saved = next(event for event in read_events(tmp_path) if event["event"] == "checkpoint")
    assert (saved["step"], saved["seconds"], saved["stall_s"], saved["bytes"]) == (2, 2.5, 0.5, 7)
    assert kinds(tmp_path) == [("start", 0), ("change", 0), ("warning", 2), ("rollback", 1)]
    assert "WARNING: the loss jumped" in capsys.readouterr().out


def test_fell_back_before_the_start_belongs_to_it(tmp_path: Path) -> None:
    observer = Observer(tmp_path, world(), {}, {}, "ddp")
    observer.fell_back("step-00000005 is damaged")
    observer.open(Progress(step=4), PARTS, None, [])
    observer.close()
    assert kinds(tmp_path) == [("warning", None), ("resume", 4)]


def test_events_that_cant_be_written_dont_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(tmp_path) as observer:
        (tmp_path / "events.jsonl").unlink()
        (tmp_path / "events.jsonl").mkdir()
        observer.saved(1, seconds=1.0, stall_s=1.0, num_bytes=1)
    assert "events.jsonl can't be written" in capsys.readouterr().out


# Loggers.


@dataclass(kw_only=True)
class Told(AbstractLogger):
    """Remembers what it was told; `Everywhere` on every rank."""

    def __post_init__(self) -> None:
        self.told: list[Any] = []

    def join(self, world: Any, folder: Path) -> None:
        self.told.append(("join", world.rank))

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.told.append(("open", step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("log", step))

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def advance(self, step: int) -> None:
        self.told.append(("advance", step))

    def event(self, name: str, entries: Mapping[str, Any]) -> None:
        self.told.append((name, entries.get("step", entries.get("now"))))

    def close(self) -> None:
        self.told.append(("close",))


@dataclass(kw_only=True)
class Everywhere(Told):
    every_rank: ClassVar[bool] = True


@pytest.mark.parametrize("rank", [0, 1])
def test_logger_hears_of_all_that_happens_where_it_lives(tmp_path: Path, rank: int) -> None:
    first, everywhere = Told(), Everywhere()
    observer = Observer(tmp_path, world(rank), {"first": first, "everywhere": everywhere}, {}, "ddp")
    observer.open(Progress(step=4), PARTS, 20, [])
    observer.advance(5)
    observer.log(Progress(step=5), {"loss": 1.0})
    list(observer.evaluating(iter([1, 2]), 2))  # type: ignore[list-item]
    with observer.saving():
        observer.say("now")
    observer.saved(5, seconds=1.0, stall_s=1.0, num_bytes=1)
    observer.close(ValueError("enough"))
    assert everywhere.told == [
        *[("join", rank), ("open", 4), ("start", 4), ("advance", 5), ("log", 5), ("advance", 5), ("advance", 5)],
        *[("saving", True), ("saving", False), ("checkpoint", 5), ("end", 5), ("close",)],
    ]
    assert first.told == (everywhere.told if rank == 0 else [])


def test_logger_that_cant_join_is_refused_and_all_are_closed(tmp_path: Path) -> None:
    class Refusing(Everywhere):
        def join(self, world: Any, folder: Path) -> None:
            raise ConfigError("Refusing: no. Don't (logger).")

    other = Everywhere()
    with pytest.raises(ConfigError, match="Refusing"):
        Observer(tmp_path, world(1), {"other": other, "refusing": Refusing()}, {}, "ddp")
    assert other.told == [("join", 1), ("close",)]
