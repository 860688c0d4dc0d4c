"""A search with Optuna: what it finds, what it stops, and how it is taken up again."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.fakes import FakeLauncher, Fate, sweep
from trainer.launch.base import State
from trainer.launch.book import Book, Entry, Objective, Standing
from trainer.launch.optuna_search import OptunaSearch, Settings
from trainer.launch.search import Grid, Search
from trainer.launch.space import combinations, search_space

WORDS = ("lr=tag(log,interval(1e-3,1e-1))", "dim=int(interval(16,64))")


def valley(values: Mapping[str, str]) -> Fate:
    """A job whose loss is best at lr=0.02 and dim=40, and comes down to that within ten steps."""
    off = math.log10(float(values["lr"]) / 0.02) ** 2 + (float(values["dim"]) / 40 - 1) ** 2
    return Fate(steps=10, loss=lambda step: 0.3 + off + 2.0 / step**2)


def optuna(words: tuple[str, ...] = WORDS, **settings: object) -> Callable[[Book], Search]:
    objective = Objective(maximize=bool(settings.pop("maximize", False)))
    made = Settings(**{"trials": 12, **settings})  # type: ignore[arg-type]
    return lambda book: OptunaSearch(search_space(words), made, objective, book.entries)


def best(entries: Mapping[str, Entry]) -> float:
    return min(entry.metrics["val_loss"] for entry in entries.values() if entry.standing is Standing.finished)


def test_search_of_twelve_ends_within_two_percent_of_nine_points_of_a_grid(tmp_path: Path) -> None:
    _, jobs = combinations(["lr=1e-3,1e-2,1e-1", "dim=16,40,64"])
    _, grid, _ = sweep(tmp_path / "grid", FakeLauncher(fates=valley), lambda book: Grid(jobs, book.entries))
    code, found, _ = sweep(tmp_path / "optuna", FakeLauncher(fates=valley), optuna())
    assert (code, len(grid), len(found)) == (0, 9, 12)
    assert best(found) <= 1.02 * best(grid)
    pruned = [entry for entry in found.values() if entry.standing is Standing.pruned]
    assert pruned, "none was stopped"
    assert all(entry.metrics["step"] < 10 for entry in pruned)


def test_search_prunes_nothing_where_it_is_told_to_or_before_its_step(tmp_path: Path) -> None:
    for name, settings in (("none", {"pruner": "none"}), ("late", {"prune_after": 10})):
        _, found, _ = sweep(tmp_path / name, FakeLauncher(fates=valley), optuna(**settings))
        assert {entry.standing for entry in found.values()} == {Standing.finished}


def test_search_by_halving_stops_jobs_early(tmp_path: Path) -> None:
    _, found, _ = sweep(tmp_path, FakeLauncher(fates=valley), optuna(pruner="halving", prune_after=1))
    assert Standing.pruned in {entry.standing for entry in found.values()}


def test_search_goes_on_with_other_points_and_more_trials(tmp_path: Path) -> None:
    launcher = FakeLauncher(fates=valley)
    _, first, _ = sweep(tmp_path, launcher, optuna(trials=5))
    code, found, _ = sweep(tmp_path, launcher, optuna(trials=12))
    assert (code, len(launcher.started), len(found)) == (0, 12, 12)
    assert list(found)[:5] == list(first)
    assert len({entry.words for entry in found.values()}) == 12


class KilledError(Exception):
    """Stands for a kill."""


def test_search_whose_command_was_killed_finds_its_jobs_again(tmp_path: Path) -> None:
    def show(entries: list[Entry]) -> None:
        if len(entries) >= 7 and entries[-1].metrics:
            raise KilledError

    launcher = FakeLauncher(fates=valley)
    with pytest.raises(KilledError):
        sweep(tmp_path, launcher, optuna(), show=show)  # type: ignore[arg-type]
    code, found, _ = sweep(tmp_path, launcher, optuna())
    assert (code, len(found)) == (0, 12)
    assert sorted(launcher.started) == sorted(found)


def test_search_looks_for_more_where_more_is_better(tmp_path: Path) -> None:
    def hill(values: Mapping[str, str]) -> Fate:
        return Fate(loss=lambda step: float(values["lr"]))

    _, found, _ = sweep(
        tmp_path, FakeLauncher(fates=hill), optuna(("lr=interval(0,1)",), trials=20, maximize=True, pruner="none"),
        Objective(maximize=True),
    )  # fmt: skip
    values = [float(entry.values["lr"]) for entry in found.values()]
    assert sum(values[-6:]) / 6 > 0.75
    assert max(values) > 0.95


def test_search_of_few_points_ends_when_each_was_tried(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    words = ("optimizer=sgd,adamw", "clip=range(1,3)", "decay=range(0.1,0.35,0.1)")
    code, found, _ = sweep(tmp_path, launcher, optuna(words, trials=30))
    assert (code, len(found)) == (0, 12)
    assert len({entry.words for entry in found.values()}) == 12
    assert {entry.values["decay"] for entry in found.values()} == {"0.1", "0.2", "0.3"}


def test_search_outlives_jobs_that_fail_or_diverge(tmp_path: Path) -> None:
    def fate(values: Mapping[str, str]) -> Fate:
        lr = float(values["lr"])
        ends = State.failed if lr > 0.05 else State.finished
        return Fate(ends=ends, loss=(lambda step: math.nan) if lr < 0.002 else valley(values).loss)

    code, found, _ = sweep(tmp_path, FakeLauncher(fates=fate), optuna(trials=30, sampler="random", pruner="none"))
    kinds = {entry.standing for entry in found.values()}
    assert (code, len(found), kinds) == (1, 30, {Standing.finished, Standing.failed})
    assert any(math.isnan(entry.metrics["val_loss"]) for entry in found.values())


def test_search_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna\. pip install 'shardwright\[sweep\]'"):
        OptunaSearch(search_space(WORDS), Settings(), Objective(), [])


@pytest.mark.parametrize(("key", "value"), [("trials", 0), ("prune_after", -1), ("search_seed", -1)])
def test_settings_that_are_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"--{key.replace('_', '-')} {value} is below"):
        Settings(**{key: value})
