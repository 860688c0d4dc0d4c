"""Some moves of the grid on real checkpoints, a run that goes through every strategy, and what must be noticed.

All of it: `python -m tests.moves` (docs/any-to-any.md).
"""

from __future__ import annotations

import shutil
from collections import Counter
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest

import strategies
from strategies.testing import Workers
from tests.faults.compare import last_checkpoint
from tests.moves import controls, job
from tests.moves.job import AFTER, BEFORE, GLOBAL_BATCH, KINDS, MICRO_BATCHES, STEPS
from tests.moves.plan import KINDS as WAYS
from tests.moves.plan import Move, Place, grid, places, sample
from tests.moves.runner import Run, Runner, held_against
from tests.trainer.jobs import lines, record_of
from trainer.config import strategy_names
from trainer.random_state import derive

LIBRARIES = {
    "horovod": "horovod",
    **dict.fromkeys(["zero1", "zero2", "zero3", "zero3_offload", "zero_infinity", "zero_hpz"], "deepspeed"),
}
"""What a strategy can't do without, where that may be missing."""
ELSEWHERE = {"horovod_elastic"}
"""Refused under any launcher but one; the same class as another, and moved in test_horovod_elastic.py."""


@pytest.fixture(scope="module")
def everywhere(workers: Workers) -> list[Place]:
    """Every registered strategy, wherever it runs."""
    return places(workers)


@pytest.fixture(scope="module")
def runner(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Shared, for the runs that stay."""
    return Runner(workers=workers, folder=tmp_path_factory.mktemp("moves"))


def runnable() -> list[str]:
    """The strategies that can run in these processes, and whose library is installed."""
    here = [name for name in strategy_names() if name not in ELSEWHERE]
    return [name for name in here if name not in LIBRARIES or find_spec(LIBRARIES[name]) is not None]


def at(text: str) -> Place:
    strategy, _, size = text.partition("@")
    return Place(strategy=strategy, size=int(size))


def way(source: str, target: str) -> Move:
    return Move(source=at(source), target=at(target))


# The plan.


def test_grid_has_each_ordered_pair_on_a_changed_number_of_ranks(everywhere: list[Place]) -> None:
    moves = grid(everywhere)
    assert {place.strategy for place in everywhere} == set(runnable())
    for source in runnable():
        for target in runnable():
            found = [move for move in moves if move.pair == (source, target) and move.kind != "stays"]
            assert len(found) == (0 if source == target == "single" else 1), f"{source} -> {target}"
    stays = [move.pair for move in moves if move.kind == "stays"]
    assert {source for source, _ in stays} == {target for _, target in stays} == set(runnable())
    kinds = Counter(move.kind for move in moves)
    assert abs(kinds["grows"] - kinds["shrinks"]) <= len(runnable())
    sizes = {(move.source.size, move.target.size) for move in moves}
    assert sizes >= {(a, b) for a in range(1, 5) for b in range(1, 5) if a != b}


def test_sample_of_the_grid_leaves_and_enters_every_strategy(everywhere: list[Place]) -> None:
    few = sample(grid(everywhere), len(runnable()) + 1)
    assert {move.pair[0] for move in few} == {move.pair[1] for move in few} == set(runnable())
    assert {move.kind for move in few} == set(WAYS)


def test_strategy_that_is_registered_enters_the_grid_and_only_where_it_runs(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = {"anywhere": "strategies.ddp:DDPStrategy", "alone": "strategies.single:SingleStrategy"}
    announced = [EntryPoint(name=name, value=value, group=strategies.ENTRY_POINTS) for name, value in plugins.items()]
    monkeypatch.setattr(strategies, "entry_points", lambda group: announced)
    found = places(workers, ["anywhere", "alone"])
    assert {"anywhere", "alone"} <= set(strategy_names())
    assert list(map(str, found)) == ["alone@1", "anywhere@1", "anywhere@2", "anywhere@3", "anywhere@4"]


# Moves.


@pytest.mark.timeout(300)
def test_moves_of_a_sample_change_nothing(runner: Runner, everywhere: list[Place]) -> None:
    for move in sample(grid(everywhere), 4):
        result = runner.move(move, *(job.DROPOUT if move.kind == "stays" else ()))
        assert not result.problems, f"{move}: {result}"


@pytest.mark.timeout(300)
def test_run_that_moves_through_every_strategy_learns_the_same(runner: Runner, everywhere: list[Place]) -> None:
    stops = [2 * number for number in range(1, STEPS // 2)]
    names = runnable()
    tour = [
        max(
            (place for place in everywhere if place.strategy == names[turn % len(names)]),
            key=lambda place: (place.size + turn) % 4,
        )
        for turn in range(len(stops) + 1)
    ]
    stayed = runner.stayed(tour[0])
    folder, order = runner.folder / "tour", list[list[str]]()
    for place, stop in zip(tour, [*stops, STEPS], strict=True):
        stopping = () if stop == STEPS else ("hooks=[killer]", f"hooks.killer.step={stop}")
        order += runner.start(folder, place, "checkpoint.keep=2", *stopping, until=stop)
    result = held_against(
        way(str(tour[0]), str(tour[-1])), Run(folder=folder, order=order[BEFORE:]), stayed, runner.kind
    )
    assert not result.problems, f"{[str(place) for place in tour]}: {result}"
    assert len(order) == STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(300)
def test_other_models_and_numbers_move_too(workers: Workers, tmp_path: Path, kind: str) -> None:
    runner = Runner(workers=workers, folder=tmp_path, kind=KINDS[kind])
    for move in (way("fsdp_full@2", "fsdp_hybrid@4"),):
        folder = runner.begun(move.source)
        before = record_of(folder)
        result = runner.move(move, folder=folder, keep=True)
        assert not result.problems, f"{move}: {result}"
        if kind == "fp16":
            assert before["scaler"] == {"scale": 2048.0, "growth_tracker": 2.0}
            assert record_of(folder)["scaler"] == {"scale": 16384.0, "growth_tracker": 0.0}
        if kind == "mixed":
            check_parts(folder, move)


def check_parts(folder: Path, move: Move) -> None:
    """Of `MixedModel`: what is frozen has no moments, what is tied is stored once, the buffer went on counting."""
    _, tensors = last_checkpoint(folder)
    assert not [name for name in tensors if name.startswith("optim/frozen")]
    assert "weights/embedding.weight" in tensors
    assert "weights/head.weight" not in tensors
    source, target = (GLOBAL_BATCH // place.size // MICRO_BATCHES[place.size] for place in (move.source, move.target))
    assert int(tensors["weights/counted"]) == BEFORE * source + AFTER * target


def test_moved_run_in_host_memory_learns_the_same(runner: Runner) -> None:
    result = runner.move(way("ddp@2", "fsdp_full@3"), there=("strategy.cpu_offload=true",))
    assert not result.problems, result


def test_moved_run_goes_back_past_a_damaged_shard(runner: Runner) -> None:
    source = at("fsdp_full@3")
    stayed = runner.stayed(source)
    folder = runner.folder / "damaged"
    shutil.copytree(stayed.folder, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08}")
    (shard,) = (folder / "checkpoints" / "step-00000012").glob("*/tensors/__2_*")  # of the last rank
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    order = runner.start(folder, at("ddp@2"))
    result = held_against(way(str(source), "ddp@2"), Run(folder=folder, order=order), stayed, runner.kind)
    assert not result.problems, result
    assert f"going on from {folder}/checkpoints/step-{BEFORE:08}" in (folder / "logs" / "rank-0.log").read_text()


# What must be noticed.


@pytest.mark.parametrize(
    ("lost", "words"),
    [("moments", "losses are"), ("position", "samples differ"), ("average", "evaluations are"), ("streams", "losses")],
)
def test_loss_on_purpose_is_noticed(runner: Runner, lost: str, words: str) -> None:
    move = way("ddp@2", "fsdp_full@2")
    folder = runner.begun(move.source, *job.DROPOUT)
    controls.lose(folder, controls.CONTROLS[lost])
    result = runner.move(move, *job.DROPOUT, folder=folder)
    assert any(words in problem for problem in result.problems), result
    if lost == "moments":
        assert result.loss > 1e-3


def test_step_that_stands_twice_is_noticed(runner: Runner) -> None:
    place = at("ddp@2")
    stayed = runner.stayed(place, *job.DROPOUT)
    folder = runner.folder / "twice"
    shutil.copytree(stayed.folder, folder)
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*rows[:8], rows[7], *rows[8:]]))
    result = held_against(way("ddp@2", "ddp@2"), Run(folder=folder, order=stayed.order), stayed, runner.kind)
    assert result.problems == [f"the moved run's steps are {[*range(1, 9), *range(8, STEPS + 1)]}"]


# Random streams.


@pytest.mark.parametrize("target", ["fsdp_full@3", "ddp@1"])
def test_streams_on_another_number_of_ranks_are_derived_by_the_rule(runner: Runner, target: str) -> None:
    folder = runner.begun(at("ddp@2"), *job.DROPOUT)
    place = at(target)
    runner.start(folder, place, *job.DROPOUT)
    said = f"written by 2 ranks, this run has {place.size}: random streams (dropout) are derived anew from seed, rank"
    log = (folder / "logs" / "rank-0.log").read_text()
    assert log.count(said) == 1
    assert ("changed since then: strategy: ddp -> fsdp_full" in log) == (place.strategy == "fsdp_full")
    assert "strategy.bucket_mb" not in log
    for rank, seed in enumerate(runner.seeds):
        assert seed == derive(0, "rank", rank, "step", BEFORE)


def test_streams_on_as_many_ranks_go_on_without_a_word(runner: Runner) -> None:
    folder = runner.begun(at("ddp@2"), *job.DROPOUT)
    runner.start(folder, at("fsdp_grad_op@2"), *job.DROPOUT)
    assert "derived anew" not in (folder / "logs" / "rank-0.log").read_text()
    assert runner.seeds == [derive(0, "rank", rank) for rank in range(2)]
    assert len(lines(folder)) == STEPS
