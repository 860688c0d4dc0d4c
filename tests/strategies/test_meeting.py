"""Ranks that wait for each other before they are connected: for a set time, and not for one that has failed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from strategies import backends, meeting
from strategies.backends import GlooBackend
from strategies.errors import ConfigError, TrainingError
from strategies.meeting import fall, wait_for
from strategies.testing import Workers
from strategies.world import Launch
from tests.starts import Start, start
from tests.trainer.jobs import ROWS


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SLICE", timedelta(seconds=0.05))
    monkeypatch.setattr(meeting.MEETING, "limit_s", 0.3)


def test_wait_for_a_rank_that_comes() -> None:
    store = dist.HashStore()
    threading.Timer(0.15, lambda: store.set("here", "")).start()
    wait_for(store, ["here"], lambda: "rank 1")


@pytest.mark.parametrize(
    ("happens", "error", "text"),
    [
        (lambda store: fall(store, 1, "ImportError: no numpy"), TrainingError, "rank 1: ImportError: no numpy"),
        (lambda store: store.set("said", "1: ConfigError: Model: no such: x (model)"), ConfigError, "Model: no such"),
        (lambda store: store.set("said", "1: TrainingError: no space"), TrainingError, "no space"),
        (lambda store: None, TrainingError, "within 0.3 s: rank 1: nothing was heard"),
    ],
)
def test_wait_ends_where_another_rank_has_ended(happens: Any, error: type[Exception], text: str) -> None:
    store, begin = dist.HashStore(), time.monotonic()
    happens(store)
    with pytest.raises(error, match=text):
        wait_for(store, ["here"], lambda: "rank 1")
    assert time.monotonic() - begin < 5


def test_meeting_names_those_who_dont_come() -> None:
    store, errors = dist.HashStore(), list[str]()

    def come(rank: int) -> None:
        with mock.patch.object(backends, "open_store", return_value=store):
            launch = Launch(rank=rank, size=4, local_size=4)
            with mock.patch.object(Launch, "from_env", return_value=launch):
                try:
                    GlooBackend(meeting_s=0.3).meet()
                except TrainingError as error:
                    errors.append(str(error))

    come(0)
    come(2)
    assert errors[0].startswith("Launch: the ranks didn't come together within 0.3 s: rank 1, 2, 3: nothing was heard")
    assert "within 0.3 s: rank 1, 3: " in errors[1]
    assert "(backend.meeting_s)" in errors[1]
    come(1)
    come(3)
    assert len(errors) == 3, "the last one finds all there"


def test_meeting_time_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="meeting_s=0 is not between"):
        GlooBackend(meeting_s=0)


def fail_early(words: list[str]) -> Start | str:
    """A start whose second rank fails with something that nobody expected, before it has met the first."""
    broken = mock.patch("trainer.build.parts_of", side_effect=RuntimeError("no driver"))
    with broken if os.environ["RANK"] == "1" else contextlib.nullcontext():
        try:
            return start(words)
        except RuntimeError as error:
            return str(error)


def test_rank_that_fails_before_it_is_connected_ends_the_others_at_once(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "model=llama_tiny", "data=python_stdlib", f"run.dir={tmp_path / 'run'}"]
    first, second = workers.run(fail_early, 2, words, timeout=60)
    assert second == "no driver"
    assert first.code == 1
    assert first.err == "TrainingError: rank 1: RuntimeError: no driver\n"
    assert first.seconds < 20
