"""Many jobs through one launcher: how many at a time, what a failure costs, and how a command is taken up again."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.trainer.launch.fakes import FakeJob, FakeLauncher, Fate, sweep
from trainer.launch import sweep as module
from trainer.launch.base import State
from trainer.launch.book import Book, Entry, Standing
from trainer.launch.search import Grid, Search

SIX = [(f"lr={lr}", f"dim={dim}") for lr in (1, 2, 3) for dim in (4, 5)]


def six(book: Book) -> Search:
    return Grid(SIX, book.entries)


def standings(entries: dict[str, Entry]) -> dict[str, int]:
    return dict(Counter(entry.standing.value for entry in entries.values()))


def burns(values: object) -> Fate:
    return Fate(ends=State.failed if values == {"lr": "2", "dim": "5"} else State.finished)


def test_sweep_of_six_of_which_one_fails_finishes_the_others_two_at_a_time(tmp_path: Path) -> None:
    launcher = FakeLauncher(fates=burns)
    code, entries, _ = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (1, {"finished": 5, "failed": 1})
    assert launcher.peak == 2
    assert launcher.started == list(entries) == [
        "000-lr-1-dim-4", "001-lr-1-dim-5", "002-lr-2-dim-4", "003-lr-2-dim-5", "004-lr-3-dim-4", "005-lr-3-dim-5",
    ]  # fmt: skip
    assert entries["003-lr-2-dim-5"].detail == "it burns"
    assert entries["000-lr-1-dim-4"].curves == {"val_loss": {1: 1.0, 2: 0.5, 3: 1 / 3}}


def test_sweep_without_a_limit_runs_all_at_once(tmp_path: Path) -> None:
    launcher = FakeLauncher(most=None)
    assert sweep(tmp_path, launcher, six)[0] == 0
    assert launcher.peak == 6


def test_sweep_again_runs_nothing_but_the_failed_one_and_that_only_if_asked(tmp_path: Path) -> None:
    sweep(tmp_path, FakeLauncher(fates=burns), six)
    launcher = FakeLauncher()
    assert sweep(tmp_path, launcher, six)[0] == 1
    assert launcher.started == []
    code, entries, _ = sweep(tmp_path, launcher, six, rerun_failed=True)
    assert (code, launcher.started) == (0, ["003-lr-2-dim-5"])
    assert standings(entries) == {"finished": 6}
    assert entries["003-lr-2-dim-5"].detail == ""


def test_sweep_with_more_values_runs_the_new_jobs_only(tmp_path: Path) -> None:
    sweep(tmp_path, FakeLauncher(), six)
    launcher = FakeLauncher()
    code, entries, _ = sweep(tmp_path, launcher, lambda book: Grid([*SIX, ("lr=4", "dim=4")], book.entries))
    assert (code, launcher.started, len(entries)) == (0, ["006-lr-4-dim-4"], 7)


def test_job_that_the_launcher_refuses_is_failed_and_the_others_run(tmp_path: Path) -> None:
    code, entries, _ = sweep(tmp_path, FakeLauncher(refuses="001-lr-1-dim-5"), six)
    assert (code, standings(entries)) == (1, {"finished": 5, "failed": 1})
    assert entries["001-lr-1-dim-5"].detail == "ConfigError: Fake: no room (launcher.room)."


def test_job_that_stops_by_itself_goes_on_with_the_next_command(tmp_path: Path) -> None:
    launcher = FakeLauncher(fates=lambda values: Fate(ends=State.stopped if values["lr"] == "3" else State.finished))
    code, entries, _ = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (75, {"finished": 4, "stopped": 2})
    again = FakeLauncher()
    assert sweep(tmp_path, again, six)[0] == 0
    assert again.started == ["004-lr-3-dim-4", "005-lr-3-dim-5"]


def interrupting(at: str, step: int = 2) -> Callable[[FakeJob], None]:
    def look(job: FakeJob) -> None:
        if (job.job.name, job.step) == (at, step):
            os.kill(os.getpid(), signal.SIGINT)

    return look


def test_interrupted_sweep_stops_its_jobs_and_the_same_command_goes_on_with_them_first(tmp_path: Path) -> None:
    launcher = FakeLauncher(look=interrupting("002-lr-2-dim-4"))
    code, entries, said = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (75, {"finished": 2, "stopped": 2})
    assert said == ["stopping the jobs that run, each with a checkpoint; again: at once"]
    assert sorted(launcher.told) == ["002-lr-2-dim-4", "003-lr-2-dim-5"]
    launcher.look, launcher.started = lambda job: None, []
    code, entries, _ = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (0, {"finished": 6})
    assert launcher.started == ["002-lr-2-dim-4", "003-lr-2-dim-5", "004-lr-3-dim-4", "005-lr-3-dim-5"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sweep_interrupted_while_the_last_jobs_end_is_done(tmp_path: Path) -> None:
    def look(job: FakeJob) -> None:
        if job.job.name == "005-lr-3-dim-5" and job.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert sweep(tmp_path, FakeLauncher(look=look), six)[0] == 0


def test_sweep_interrupted_twice_tells_the_jobs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAME_STOP_S", 0.0)

    def look(job: FakeJob) -> None:
        if job.job.name == "001-lr-1-dim-5" and job.step in (2, 4):
            os.kill(os.getpid(), signal.SIGINT)

    launcher = FakeLauncher(fates=lambda values: Fate(steps=1000), look=look, deaf=True)
    code, entries, said = sweep(tmp_path, launcher, six)
    assert (code, standings(entries), len(said)) == (75, {"stopped": 2}, 2)
    assert Counter(launcher.told) == {"000-lr-1-dim-4": 2, "001-lr-1-dim-5": 2}


class KilledError(Exception):
    """Stands for a kill: nothing of the command comes after it."""


def killed_at(step: int) -> Callable[[Sequence[Entry]], None]:
    def show(entries: Sequence[Entry]) -> None:
        if any(entry.metrics.get("step") == step for entry in entries):
            raise KilledError

    return show


def test_jobs_of_a_killed_command_are_found_again_and_not_started_twice(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with pytest.raises(KilledError):
        sweep(tmp_path, launcher, six, show=killed_at(2))
    assert launcher.started == ["000-lr-1-dim-4", "001-lr-1-dim-5"]
    code, entries, _ = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (0, {"finished": 6})
    assert Counter(launcher.started) == dict.fromkeys(entries, 1)
    assert launcher.peak == 2


def test_jobs_that_ended_after_a_kill_are_taken_as_they_ended(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with pytest.raises(KilledError):
        sweep(tmp_path, launcher, six, show=killed_at(2))
    first, second = launcher.jobs.values()
    while not first.over:
        first.status()
    second.stop()  # by the machine's end, say
    code, entries, _ = sweep(tmp_path, launcher, six)
    assert (code, standings(entries)) == (0, {"finished": 6})
    assert Counter(launcher.started)["000-lr-1-dim-4"] == 1
    assert Counter(launcher.started)["001-lr-1-dim-5"] == 2


def test_job_of_which_the_launcher_knows_nothing_any_more_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        sweep(tmp_path, FakeLauncher(), six, show=killed_at(1))
    launcher = FakeLauncher()
    assert sweep(tmp_path, launcher, six)[0] == 0
    assert len(launcher.started) == 6


class Impatient(Grid):
    """Has no hope for jobs with dim=5."""

    def hopeless(self, entry: Entry) -> bool:
        return entry.values["dim"] == "5"


def test_hopeless_jobs_are_stopped_and_not_run_again(tmp_path: Path) -> None:
    launcher = FakeLauncher(fates=lambda values: Fate(steps=5))
    code, entries, _ = sweep(tmp_path, launcher, lambda book: Impatient(SIX, book.entries))
    assert (code, standings(entries)) == (0, {"finished": 3, "pruned": 3})
    assert all(entry.standing is Standing.pruned for entry in entries.values() if entry.values["dim"] == "5")
    launcher.started = []
    assert sweep(tmp_path, launcher, six, rerun_failed=True)[0] == 0
    assert launcher.started == []
