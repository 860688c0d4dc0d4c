from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.errors import ConfigError
from tests.trainer.data.helpers import Numbers, collate, seen
from trainer.data import Loader, Order, evaluation_batches
from trainer.data.base import Sample

SOURCES = [(23, 2.0), (11, 1.0)]
GLOBAL_BATCH = 12


def global_steps(
    position: int, steps: int, data_size: int, micro_batch: int, workers: int
) -> list[list[tuple[int, int]]]:
    """(sample, seed) of each global batch, from all ranks' parts in rank order."""
    order = Order(5, SOURCES)
    found: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for rank in range(data_size):
        with Loader(
            Numbers(34),
            order,
            collate,
            seed=5,
            global_batch=GLOBAL_BATCH,
            micro_batch=micro_batch,
            data_rank=rank,
            data_size=data_size,
            workers=workers,
        ) as loader:
            for step, batches in enumerate(itertools.islice(loader.steps(position), steps)):
                assert [batch.num_targets for batch in batches] == [micro_batch] * loader.accumulation
                found[step] += [pair for batch in batches for pair in seen(batch)]
    return found


def test_loader_order_is_the_same_at_any_world_size_and_micro_batch_and_after_any_resume() -> None:
    expected = global_steps(0, 9, data_size=1, micro_batch=12, workers=0)
    assert len({pair for step in expected for pair in step}) == 9 * GLOBAL_BATCH
    layouts = [(size, micro) for size in (1, 2, 3, 4) for micro in (1, 3) if GLOBAL_BATCH % (size * micro) == 0]
    for data_size, micro_batch in layouts:
        assert global_steps(0, 9, data_size, micro_batch, 0) == expected
        assert global_steps(4 * GLOBAL_BATCH, 5, data_size, micro_batch, 0) == expected[4:]


def test_loader_order_is_the_same_with_workers_and_after_a_resume_with_them() -> None:
    expected = global_steps(0, 6, data_size=1, micro_batch=12, workers=0)
    assert global_steps(0, 6, data_size=1, micro_batch=4, workers=2) == expected
    assert global_steps(3 * GLOBAL_BATCH, 3, data_size=3, micro_batch=2, workers=2) == expected[3:]


def test_loader_position_need_not_be_a_multiple_of_the_batch() -> None:
    # The global batch may have been another one before the run was stopped.
    whole = [pair for step in global_steps(0, 3, 1, 12, 0) for pair in step]
    again = [pair for step in global_steps(7, 2, 2, 3, 0) for pair in step]
    assert again == whole[7 : 7 + 24]


class OneBroken(Numbers):
    """Sample 7 can't be read."""

    def __getitem__(self, index: int) -> Sample:
        if index == 7:
            raise OSError("broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_broken_sample_is_met_at_its_turn(workers: int) -> None:
    order = Order(5, [(34, 1.0)])
    with Loader(Numbers(34), order, collate, seed=5, global_batch=1, micro_batch=1) as loader:
        whole = [seen(batches[0]) for batches in itertools.islice(loader.steps(0), 34)]
    turn = next(step for step, pairs in enumerate(whole) if pairs[0][0] == 7)
    assert turn > 1
    with Loader(OneBroken(34), order, collate, seed=5, global_batch=1, micro_batch=1, workers=workers) as loader:
        steps = loader.steps(0)
        assert [seen(next(steps)[0]) for _ in range(turn)] == whole[:turn]
        with pytest.raises(OSError, match="broken"):
            next(steps)


def test_loader_pointed_back_midway_gives_the_same_steps_from_the_same_workers() -> None:
    with Loader(Numbers(34), Order(5, SOURCES), collate, seed=5, global_batch=12, micro_batch=3, workers=2) as loader:
        steps = loader.steps(0)
        first = [[seen(batch) for batch in next(steps)] for _ in range(3)]
        workers = worker_ids()
        again = loader.steps(12)
        assert [[seen(batch) for batch in next(again)] for _ in range(2)] == first[1:]
        assert worker_ids() == workers
        assert len(workers) == 2
    assert not worker_ids()


def worker_ids() -> list[int]:
    import multiprocessing

    return sorted(process.pid or 0 for process in multiprocessing.active_children())


def test_loader_with_more_workers_than_cores_says_nothing() -> None:
    workers = len(os.sched_getaffinity(0)) + 1  # warnings are errors here
    with Loader(
        Numbers(34), Order(5, SOURCES), collate, seed=5, global_batch=2, micro_batch=2, workers=workers
    ) as loader:
        for position in (0, 2):
            assert seen(next(loader.steps(position))[0])


def test_loader_leaves_the_random_state_of_the_process_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with Loader(Numbers(34), Order(5, SOURCES), collate, seed=5, global_batch=12, micro_batch=3) as loader:
        next(loader.steps(0))
    list(evaluation_batches(Numbers(3), collate, micro_batch=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_dropped_without_close_ends_its_workers() -> None:
    loader = Loader(Numbers(34), Order(5, SOURCES), collate, seed=5, global_batch=12, micro_batch=3, workers=1)
    next(loader.steps(0))
    assert len(worker_ids()) == 1
    del loader
    assert not worker_ids()


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "data_size", "words"),
    [
        (10, 3, 2, "global_batch=6 or 12 (trainer.global_batch), or micro_batch=1 or 5 (trainer.micro_batch)"),
        (2, 2, 3, "global_batch=6 (trainer.global_batch)."),
        (8, 0, 1, "trainer.global_batch, trainer.micro_batch"),
    ],
)
def test_loader_batch_that_cannot_be_cut_is_refused_with_what_would_work(
    global_batch: int, micro_batch: int, data_size: int, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Loader(
            Numbers(5),
            Order(0, [(5, 1.0)]),
            collate,
            seed=0,
            global_batch=global_batch,
            micro_batch=micro_batch,
            data_size=data_size,
        )
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "limit"), [(23, None), (2, None), (23, 9), (5, 99), (1, None)])
def test_evaluation_visits_each_sample_once_in_equally_many_batches(
    data_size: int, count: int, limit: int | None
) -> None:
    ranks = [
        list(
            evaluation_batches(Numbers(count), collate, micro_batch=3, data_rank=rank, data_size=data_size, limit=limit)
        )
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [batch for batches in ranks for batch in batches if batch.num_targets]
    visited = [sample for batch in counted for sample, _ in seen(batch)]
    chosen = min(count, limit or count)
    assert visited == [index * count // chosen for index in range(chosen)]
    assert len(set(visited)) == chosen
    for batch in (batch for batches in ranks for batch in batches if not batch.num_targets):
        assert (batch.labels == -100).all()
        assert batch.num_tokens == 0


def test_evaluation_with_workers_gives_the_same_and_ends_them_also_when_abandoned() -> None:
    alone = [seen(batch) for batch in evaluation_batches(Numbers(10), collate, micro_batch=3, seed=4)]
    helped = [seen(batch) for batch in evaluation_batches(Numbers(10), collate, micro_batch=3, seed=4, workers=2)]
    assert helped == alone
    assert not worker_ids()
    abandoned = evaluation_batches(Numbers(10), collate, micro_batch=3, seed=4, workers=2)
    next(abandoned)
    assert worker_ids()
    del abandoned
    assert not worker_ids()


def test_evaluation_of_nothing_gives_nothing() -> None:
    assert not list(evaluation_batches(Numbers(0), collate, micro_batch=3))


def test_closing_leaves_no_thread_that_still_holds_a_semaphore() -> None:
    loader = Loader(Numbers(9), Order(0, [(9, 1.0)]), collate, seed=0, global_batch=2, micro_batch=1, workers=2)
    steps = loader.steps(0)
    next(steps)
    feeders = [thread for thread in threading.enumerate() if "QueueFeeder" in thread.name]
    assert len(feeders) == 2
    loader.close()
    assert not any(thread.is_alive() for thread in feeders)


SCRIPT = """
import signal, sys, time
from tests.trainer.data.helpers import Numbers, collate
from trainer.data import Loader, Order

if __name__ == "__main__":
    loader = Loader(Numbers(9), Order(0, [(9, 1.0)]), collate, seed=0, global_batch=2, micro_batch=1, workers=2)
    steps = loader.steps(0)
    next(steps)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    try:
        print("ready", flush=True)
        while not asked:
            next(steps)
            time.sleep(0.01)
        for _ in range(20):  # a step or two is still to be finished when a run is asked to stop
            next(steps)
        print("finished", flush=True)
    except KeyboardInterrupt:
        sys.exit(3)
"""


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 3), (signal.SIGTERM, True, 0), (signal.SIGKILL, False, -9)],
    ids=["interrupted", "terminated", "killed"],
)
def test_loader_workers_are_silent_on_signals_and_gone_with_their_process(
    number: signal.Signals, whole_group: bool, code: int, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        # An interruption may leave a socket that was just being opened to the garbage collector.
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(group(process.pid)) >= 4  # with the fork server and two workers
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(timeout=30) == code
    deadline = time.monotonic() + 20
    while group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group(process.pid)
    out, errors = process.communicate()
    assert errors == ""
    assert out == ("finished\n" if number == signal.SIGTERM else "")


def group(leader: int) -> list[int]:
    """Processes of a group that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def refusing(samples: list[Any], seeds: list[int]) -> Any:
    raise ConfigError("Task: sample 3 is damaged. Mend it (data.path).")


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_refusal_is_one_line_whoever_makes_the_batches(workers: int) -> None:
    with (
        Loader(
            Numbers(5), Order(0, [(5, 1.0)]), refusing, seed=0, global_batch=2, micro_batch=2, workers=workers
        ) as it,
        pytest.raises(ConfigError) as error,
    ):
        next(it.steps(0))
    assert str(error.value) == "Task: sample 3 is damaged. Mend it (data.path)."
