"""events.jsonl: what is noted, and what a reader makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.metrics.events import EVENTS, has_ended, history, note, read_events


def start(step: int, **more: Any) -> dict[str, Any]:
    return {"event": "start", "step": step, "last_seen_step": step, "strategy": "ddp", "world_size": 2, **more}


def end(step: int, outcome: str = "finished") -> dict[str, Any]:
    return {"event": "end", "step": step, "outcome": outcome, "reason": "because"}


def kinds(*events: dict[str, Any]) -> list[tuple[str, int | None]]:
    return [(each.kind, each.step) for each in history(events)]


def test_note_after_a_torn_line_loses_neither_the_old_nor_the_new(tmp_path: Path) -> None:
    note(tmp_path, "start", step=0)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "checkpoint", "st')
    note(tmp_path, "end", step=4)
    note(tmp_path, "start", step=4)
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [
        ("start", 0), ("end", 4), ("start", 4),
    ]  # fmt: skip
    assert all(event["time"].endswith("+00:00") for event in read_events(tmp_path))


def test_read_events_of_something_else_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    (tmp_path / EVENTS).write_bytes(b'[1]\n"x"\n{"event": 3}\n\xff\xfe\nnull\n')
    assert read_events(tmp_path) == []


def test_history_start_after_a_start_without_end_is_a_kill_at_the_last_step_seen() -> None:
    assert kinds(start(0), start(10, last_seen_step=17), end(20)) == [
        ("start", 0), ("kill", 17), ("resume", 10), ("end", 20),
    ]  # fmt: skip


@pytest.mark.parametrize(("outcome", "kind"), [("finished", "end"), ("stopped", "end"), ("failed", "failure")])
def test_history_start_after_an_end_is_no_kill(outcome: str, kind: str) -> None:
    assert kinds(start(0), end(5, outcome), start(5)) == [("start", 0), (kind, 5), ("resume", 5)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"strategy": "fsdp_full"}, ["ddp → fsdp_full"]),
        ({"world_size": 4}, ["2 → 4 ranks"]),
        ({"strategy": "zero3", "world_size": 8, "device": "cuda"}, ["ddp → zero3, 2 → 8 ranks, ? → cuda"]),
    ],
)
def test_history_tells_of_another_way_to_spread(change: dict[str, Any], said: list[str]) -> None:
    found = history([start(0), end(5, "stopped"), start(5, **change)])
    assert [each.text for each in found if each.kind == "spread"] == said


def test_history_tells_of_changes_rollbacks_and_warnings() -> None:
    found = history(
        [
            start(0, changes=["optimizer.lr: 1 -> 2"]),
            {"event": "continuity", "step": 3, "text": "a jump"},
            {"event": "rollback", "step": 2, "last_seen_step": 4},
            {"event": "checkpoint", "step": 4},
            {"event": "something new"},
        ]
    )
    assert [(each.kind, each.step) for each in found] == [("start", 0), ("change", 0), ("warning", 3), ("rollback", 2)]
    assert [each.text for each in found[1:]] == ["optimizer.lr: 1 -> 2", "a jump", "rolled back from step 4 to 2"]


def test_history_damaged_checkpoint_belongs_to_the_start_that_met_it() -> None:
    fell_back = {"event": "fell_back", "step": None, "text": "damaged"}
    assert kinds(start(0), fell_back, start(5, last_seen_step=9)) == [
        ("start", 0), ("kill", 9), ("warning", None), ("resume", 5),
    ]  # fmt: skip
    assert kinds(start(0), end(9, "stopped"), fell_back)[-1] == ("warning", None)  # and then it didn't start


def test_has_ended() -> None:
    assert not has_ended([])
    assert not has_ended([start(0), end(3), start(3)])
    assert has_ended([start(0), start(0), end(3), {"event": "checkpoint"}])
