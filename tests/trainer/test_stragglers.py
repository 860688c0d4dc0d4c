"""Which rank holds up the others, and when it is spoken of."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from strategies.base import Batch, LossTerms
from strategies.testing import Workers
from tests.trainer.jobs import ROWS, Rows, fit, lines
from trainer.metrics.events import history, read_events
from trainer.metrics.stragglers import WINDOWS, Stragglers, slowest_of


def told(windows: list[list[float]]) -> list[int]:
    """The windows after which somebody was named."""
    found = Stragglers()
    return [index for index, work in enumerate(windows) if found.note(work, [0.0] * len(work)) is not None]


EVEN, SLOW = [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 0.9, 1.5]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([EVEN] * 20, []),
        ([SLOW] * 20, [WINDOWS - 1]),  # once
        ([SLOW, EVEN] * 20, []),
        ([[1.5, 1, 1, 1], [1, 1.5, 1, 1]] * 20, []),  # each in turn
        ([SLOW] * WINDOWS + [EVEN] * WINDOWS + [SLOW] * WINDOWS, [WINDOWS - 1, 3 * WINDOWS - 1]),
        ([SLOW] * WINDOWS + [EVEN] + [SLOW] * WINDOWS, [WINDOWS - 1]),  # one good window isn't the end of it
        ([[0.001, 0.004]] * 20, []),  # nobody minds three milliseconds
        ([[0.1, 0.2]] * 20, [WINDOWS - 1]),
        ([[0.0, 0.0]] * 20, []),
    ],
)
def test_straggler_is_told_once_after_several_windows(windows: list[list[float]], expected: list[int]) -> None:
    assert told(windows) == expected


def test_straggler_words_say_who_where_and_by_how_much() -> None:
    stragglers = Stragglers()
    found = [stragglers.note([1.0, 1.5], [0.1, 0.4]) for _ in range(WINDOWS)][-1]
    assert found is not None
    assert found.words("blue") == (
        "rank 1 (blue) holds up the others: 1.5 s of work per step where they have 1 s (50% more; 0.4 s of it data), "
        "over the last 5 logged windows"
    )


def test_slowest_of_two_is_held_against_the_other() -> None:
    assert slowest_of([1.0, 3.0]) == (1, 1.0)
    assert slowest_of([4.0, 1.0, 2.0]) == (0, 1.5)


@dataclass(kw_only=True)
class Lame(Rows):
    """The second rank takes longer."""

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        """See `Trainer.loss`."""
        time.sleep(0.03 * int(os.environ["RANK"]))
        return super().loss(outputs, batch)


def fit_lamely(folder: str, overrides: list[str]) -> dict[str, Any]:
    return fit(folder, overrides, Lame)


def test_slow_rank_of_a_run_is_named_and_measured(workers: Workers, tmp_path: Path) -> None:
    run = tmp_path / "run"
    workers.run(fit_lamely, 2, str(run), [*ROWS, "trainer.max_steps=8", "strategy=ddp"], timeout=100)
    [event] = [event for event in read_events(run) if event["event"] == "straggler"]
    assert event["text"].startswith("rank 1 (")
    assert WINDOWS <= event["step"] <= WINDOWS + 1
    assert ("warning", event["text"]) in [(each.kind, each.text) for each in history(read_events(run))]
    logged = [line for line in lines(run) if "straggle" in line]
    assert [line["slowest_rank"] for line in logged[2:]] == [1] * (len(logged) - 2)
    assert min(line["straggle"] for line in logged[2:]) > 0.25
