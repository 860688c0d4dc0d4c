"""Stops at awkward moments: during an evaluation, near a time limit, and with checkpoints that are slow."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from strategies.testing import Workers
from tests.trainer.jobs import ROWS, curve, fit, lines, record_of
from trainer.checkpoint.store import FolderStore
from trainer.evaluation import until_stopped
from trainer.metrics.events import read_events
from trainer.stop import StopRequest

EVALUATED = [*ROWS, "trainer.eval_every=5", "trainer.num_validation=20", "trainer.dropout=0.2", "checkpoint.every=5"]


def fit_and_signal(folder: str, words: list[str], rank: int, nth: int) -> dict[str, Any]:
    """A start in which `rank` hears a SIGTERM before the `nth` validation batch."""
    seen = 0

    def watched(batches: Any, world: Any, request: Any) -> Any:
        def counted() -> Any:
            nonlocal seen
            for batch in batches:
                seen += 1
                if seen == nth and world.rank == rank:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return until_stopped(counted(), world, request)

    with mock.patch("trainer.session.until_stopped", watched):
        return fit(folder, words, "Rows")


def fit_slowly(folder: str, words: list[str], seconds: float) -> dict[str, Any]:
    """A start whose checkpoints take `seconds` longer; `saved_s`: when the last one was there, from its beginning."""
    real, begin, saved = FolderStore.publish, time.monotonic(), 0.0

    def beginning(*arguments: Any, **settings: Any) -> StopRequest:
        nonlocal begin
        begin = time.monotonic()
        return StopRequest(*arguments, **settings)

    def slow(self: FolderStore, name: str, data: bytes) -> None:
        nonlocal saved
        if name.endswith("manifest.json"):
            time.sleep(seconds)
        real(self, name, data)
        saved = time.monotonic() - begin

    with mock.patch.object(FolderStore, "publish", slow), mock.patch("trainer.session.StopRequest", beginning):
        return fit(folder, words, "Rows") | {"saved_s": saved}


@pytest.mark.parametrize(("rank", "nth"), [(0, 2), (1, 1)])
def test_stop_during_an_evaluation_breaks_it_off_and_makes_up_for_it(
    workers: Workers, tmp_path: Path, rank: int, nth: int
) -> None:
    workers.run(fit, 2, str(tmp_path / "whole"), EVALUATED, "Rows", timeout=60)
    for answer in workers.run(fit_and_signal, 2, str(tmp_path / "cut"), EVALUATED, rank, nth, timeout=60):
        assert answer["stopped"]
        assert answer["progress"]["step"] == 5
    assert "val_loss" not in lines(tmp_path / "cut")[-1]
    assert record_of(tmp_path / "cut", 5)["evaluation_due"]
    workers.run(fit, 2, str(tmp_path / "cut"), EVALUATED, "Rows", timeout=60)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_stop_during_the_last_evaluation_leaves_it_to_the_next_start(workers: Workers, tmp_path: Path) -> None:
    words = [*EVALUATED, "trainer.eval_every=null"]
    workers.run(fit, 2, str(tmp_path / "whole"), words, "Rows", timeout=60)
    for answer in workers.run(fit_and_signal, 2, str(tmp_path / "cut"), words, 1, 3, timeout=60):
        assert answer["stopped"]
        assert answer["progress"]["step"] == 10
    workers.run(fit, 2, str(tmp_path / "cut"), words, "Rows", timeout=60)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert not json.loads((tmp_path / "cut" / "summary.json").read_text())["stopped"]


def test_stop_at_the_time_limit_leaves_the_time_that_a_checkpoint_takes(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "trainer.max_steps=1000000", "trainer.max_time=4", "checkpoint.every=100", "checkpoint.keep=1"]
    (answer, _) = workers.run(fit_slowly, 2, str(tmp_path / "run"), words, 1.0, timeout=60)
    saves = [event for event in read_events(tmp_path / "run") if event["event"] == "checkpoint"]
    assert len(saves) > 1, "nothing was learned of how long a checkpoint takes"
    assert answer["stopped"]
    assert 2 < answer["saved_s"] < 4 + 0.9, "the last checkpoint came after the limit"


def test_stop_with_checkpoints_that_take_longer_than_the_grace_says_so(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "trainer.grace=0.2", "checkpoint.every=5"]
    workers.run(fit_slowly, 1, str(tmp_path / "run"), words, 0.3, timeout=60)
    assert (tmp_path / "run" / "logs" / "rank-0.log").read_text().count("trainer.grace") == 1


def test_resume_that_jumps_is_a_loud_warning(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "schedule=constant"]
    workers.run(fit, 2, str(tmp_path / "run"), words, "Rows", timeout=60)
    workers.run(fit, 2, str(tmp_path / "run"), [*words, "trainer.max_steps=12"], "Rows", timeout=60)
    assert "WARNING" not in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    workers.run(fit_forgetful, 2, str(tmp_path / "run"), [*words, "trainer.max_steps=14"], timeout=60)
    text = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "WARNING shardwright: the run doesn't go on as it was going: at step 13" in text


def fit_forgetful(folder: str, words: list[str]) -> dict[str, Any]:
    """A start that loses the weights while it loads them."""
    from strategies.ddp import DDPStrategy

    real = DDPStrategy.load_state

    def broken(self: Any, model: Any, optimizer: Any, state: Any) -> None:
        weights = {name: value * 40 for name, value in state.weights.items()}
        real(self, model, optimizer, replace(state, weights=weights))

    with mock.patch.object(DDPStrategy, "load_state", broken):
        return fit(folder, words, "Rows")


def test_resume_where_the_checkpoints_are_gone_is_refused(workers: Workers, tmp_path: Path) -> None:
    workers.run(fit, 2, str(tmp_path / "run"), ROWS, "Rows", timeout=60)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    for answer in workers.run(fit, 2, str(tmp_path / "run"), ROWS, "Rows", timeout=60):
        assert answer["error"] == "ConfigError"
        assert "had a checkpoint at step 10" in answer["message"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
