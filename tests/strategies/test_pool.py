"""The worker pool: what a job finds, what it leaves, and what happens when it goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies.testing import JobError, Workers
from strategies.world import Launch, open_store


@pytest.fixture(scope="module")
def own_workers() -> Iterator[Workers]:
    pool = Workers()
    yield pool
    pool.close()


def variables() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS", "EXTRA")
    return {name: os.environ[name] for name in names if name in os.environ}


def sum_of_ranks(factor: torch.Tensor) -> torch.Tensor:
    dist.init_process_group("gloo")
    value = factor * (dist.get_rank() + 1)
    dist.all_reduce(value)
    return value


def fail_on(rank: int, word: str) -> str:
    dist.init_process_group("gloo")
    print(f"about to {word}")
    if dist.get_rank() == rank:
        raise ValueError(word)
    dist.all_reduce(torch.ones(1))
    return "never"


def hang_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        time.sleep(600)
    return os.getpid()


def die_on(rank: int) -> int:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def process_id() -> int:
    return os.getpid()


def spoil(folder: str) -> None:
    os.environ["EXTRA"] = "left behind"
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.init_process_group("gloo")
    open_store(Launch.from_env())


def look_around() -> tuple[str | None, str, bool, torch.dtype, bool, bool, int]:
    handler = signal.getsignal(signal.SIGTERM)
    return (
        os.environ.get("EXTRA"),
        str(Path.cwd()),
        "elsewhere" in sys.path[0],
        torch.get_default_dtype(),
        handler is signal.SIG_IGN,
        dist.is_initialized(),
        open_store.cache_info().currsize,
    )


def warn() -> None:
    warnings.warn("look out", UserWarning, stacklevel=1)


def leave() -> None:
    sys.exit(3)


def test_job_finds_what_torchrun_would_set(workers: Workers) -> None:
    found = workers.run(variables, 4, local_size=2, environment={"EXTRA": "here"})
    assert [each["RANK"] for each in found] == ["0", "1", "2", "3"]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "1", "0", "1"]
    assert [each["GROUP_RANK"] for each in found] == ["0", "0", "1", "1"]
    for each in found:
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (each["OMP_NUM_THREADS"], each["EXTRA"]) == ("1", "here")


def test_jobs_of_any_size_run_on_the_same_processes(workers: Workers) -> None:
    three, one, two = (workers.run(process_id, size) for size in (3, 1, 2))
    assert three[:1] == one
    assert three[:2] == two
    assert os.getpid() not in three


def test_tensors_go_both_ways(workers: Workers) -> None:
    for value in workers.run(sum_of_ranks, 3, torch.tensor([1.0, 2.0])):
        assert value.tolist() == [6.0, 12.0]


def test_job_leaves_nothing_behind(workers: Workers, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    before = workers.run(look_around, 2)
    workers.run(spoil, 2, str(folder))
    assert workers.run(look_around, 2) == before
    assert before[0] == (None, str(Path.cwd()), False, torch.float32, False, False, 0)


def test_failing_rank_is_named_with_its_traceback_and_output(workers: Workers) -> None:
    with pytest.raises(JobError) as caught:
        workers.run(fail_on, 2, 1, "stumble")
    text = str(caught.value)
    assert "rank 1 first" in text
    assert "rank 1: ValueError: stumble" in text
    assert "in fail_on" in text
    assert "about to stumble" in text
    assert [outcome.rank for outcome in caught.value.outcomes] == [0, 1]


def test_failure_doesnt_cost_the_pool(workers: Workers) -> None:
    before = workers.run(process_id, 2)
    outcomes = workers.outcomes(fail_on, 2, 0, "stumble")
    assert outcomes[0].error == "ValueError"
    assert outcomes[0].message == "stumble"
    assert outcomes[1].error is not None, "rank 1 waits in a collective; it must hear that rank 0 is gone"
    assert workers.run(process_id, 2) == before


def test_exit_in_a_job_is_an_outcome(workers: Workers) -> None:
    outcomes = workers.outcomes(leave, 1)
    assert (outcomes[0].error, outcomes[0].message) == ("SystemExit", "3")


def test_warning_that_is_an_error_here_is_one_there(workers: Workers) -> None:
    assert workers.outcomes(warn, 1)[0].error == "UserWarning"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workers.run(warn, 1)


def test_local_function_is_refused(workers: Workers) -> None:
    with pytest.raises(ValueError, match="top level"):
        workers.run(lambda: None, 1)


def test_size_beyond_the_pool_is_refused(workers: Workers) -> None:
    with pytest.raises(ValueError, match=r"size=5 is not in 1\.\.4"):
        workers.run(process_id, 5)


def test_late_rank_is_killed_and_shows_its_stack(own_workers: Workers) -> None:
    with pytest.raises(JobError) as caught:
        own_workers.run(hang_on, 2, 1, timeout=2.0)
    text = str(caught.value)
    assert "rank 1: Timeout" in text
    assert "in hang_on" in text
    old = caught.value.outcomes[0].value
    assert f"rank 0 returned {old}" in text
    assert old not in own_workers.run(process_id, 2)


def test_dead_rank_is_reported_and_replaced(own_workers: Workers) -> None:
    outcomes = own_workers.outcomes(die_on, 2, 1)
    assert (outcomes[1].error, outcomes[1].message) == ("Died", "exit code -9")
    assert len(set(own_workers.run(process_id, 2))) == 2


def with_threads(number: int) -> int:
    for _ in range(number):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


def test_worker_in_which_many_threads_are_left_is_replaced(own_workers: Workers) -> None:
    [few] = own_workers.run(with_threads, 1, 5)
    [many] = own_workers.run(with_threads, 1, 250)
    [after] = own_workers.run(with_threads, 1, 0)
    assert few == many
    assert after != many


def test_close_leaves_no_process(own_workers: Workers) -> None:
    ids = own_workers.run(process_id, 2)
    own_workers.close()
    own_workers.close()
    assert not any(Path(f"/proc/{each}").exists() for each in ids)


_ABANDON = """
import os, sys, threading
from strategies.testing import Workers
from tests.strategies import test_pool
pool = Workers()
print(*pool.run(test_pool.process_id, 1), flush=True)
threading.Thread(target=lambda: pool.run(test_pool.hang_on, 1, 0), daemon=True).start()
threading.Event().wait(1.0)
os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    code = f"import sys; sys.path[:] = {[str(Path(folder).absolute()) for folder in sys.path]}\n{_ABANDON}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    ids = done.stdout.split()
    assert len(ids) == 1
    deadline = time.monotonic() + 10.0
    while any(Path(f"/proc/{each}").exists() for each in ids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
