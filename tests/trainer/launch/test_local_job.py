"""A job in the background: its exit code or what it has noted, and how another process finds it again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from strategies.errors import ConfigError
from trainer.launch import LaunchJob, LocalLauncher, State, local_job
from trainer.launch.base import LaunchedJob
from trainer.metrics.events import note
from trainer.metrics.jsonl import MetricsFile

# In place of scripts/launch.py, which takes seconds to start; it does what the file that it is given says.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
words = sys.argv[1:]
folder = Path(next(word for word in words if word.startswith("run.dir=")).partition("=")[2])
(folder / "words").write_text("\\n".join(words))
(folder / "variables").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "") + " " + os.environ["OMP_NUM_THREADS"])
exec(Path(words[words.index("--script") + 1]).read_text())
"""
WAITS = "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n(folder / 'listens').touch()\ntime.sleep(60)"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LaunchedJob]:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "launch.py").write_text(STAND_IN)
    monkeypatch.setattr(local_job, "SCRIPTS", tmp_path / "scripts")

    def start(does: str, launcher: LocalLauncher | None = None, name: str = "job") -> LaunchedJob:
        script = tmp_path / f"{name}.py"
        script.write_text(does)
        job = LaunchJob(name=name, script=script, overrides=("seed=1",), folder=tmp_path / name)
        return (launcher or LocalLauncher(processes=1)).start(job)

    return start


def ended(job: LaunchedJob) -> State:
    return until(lambda: job.status().state if job.status().state.over else None)


def until(asked: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while (found := asked()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("does", "state", "detail"),
    [
        ("", State.finished, ""),
        ("sys.exit(75)", State.stopped, ""),
        ("print('ConfigError: A: no (a).'); print('more'); sys.exit(2)", State.failed, "ConfigError: A: no (a)."),
        ("print('some'); print('words'); sys.exit(1)", State.failed, "words"),
        ("sys.exit(3)", State.failed, "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", State.failed, "exit code -9"),
    ],
)  # fmt: skip
def test_job_that_ended_says_how(start: Callable[..., LaunchedJob], does: str, state: State, detail: str) -> None:
    job = start(does)
    assert ended(job) is state
    assert job.status().detail == detail


def test_job_started_again_gives_the_reason_of_its_newest_start(start: Callable[..., LaunchedJob]) -> None:
    ended(start("print('ConfigError: old'); sys.exit(2)"))
    job = start("print('TrainingError: new'); sys.exit(1)")
    ended(job)
    assert job.status().detail == "TrainingError: new"


def test_job_gets_its_folder_its_words_and_its_metrics_are_seen(
    start: Callable[..., LaunchedJob], tmp_path: Path
) -> None:
    job = start(WAITS)
    until(lambda: (tmp_path / "job" / "listens").exists() or None)
    assert job.status().state is State.waiting
    words = (tmp_path / "job" / "words").read_text().splitlines()
    assert words == ["launcher.processes=1", "launcher.max_restarts=0", "--script", str(tmp_path / "job.py"),
                     f"run.dir={tmp_path / 'job'}", "seed=1"]  # fmt: skip
    with MetricsFile(tmp_path / "job" / "metrics.jsonl") as file:
        file.write(3, {"val_loss": 0.5})
    status = job.status()
    assert (status.state, status.metrics, status.curves) == (
        State.running, {"step": 3, "val_loss": 0.5}, {"val_loss": {3: 0.5}},
    )  # fmt: skip
    job.stop()
    assert ended(job) is State.stopped


def test_job_that_is_told_to_stop_before_it_listens_is_stopped(start: Callable[..., LaunchedJob]) -> None:
    job = start("time.sleep(60)")
    job.stop()
    assert ended(job) is State.stopped


def test_job_is_found_again_while_it_runs_and_can_be_stopped(start: Callable[..., LaunchedJob], tmp_path: Path) -> None:
    job = start(WAITS)
    until(lambda: (tmp_path / "job" / "listens").exists() or None)
    found = LocalLauncher(processes=1).find(job.job, job.handle)
    assert found is not None
    assert found.handle == job.handle
    assert not found.status().state.over
    found.stop()
    assert ended(job) is State.stopped
    assert ended(found) is State.stopped


@pytest.mark.parametrize(
    ("outcome", "state"), [("finished", State.finished), ("stopped", State.stopped), ("failed", State.failed),
                           (None, State.stopped)],
)  # fmt: skip
def test_job_found_after_its_end_is_what_it_has_noted(
    start: Callable[..., LaunchedJob], tmp_path: Path, outcome: str | None, state: State
) -> None:
    (tmp_path / "job").mkdir()
    note(tmp_path / "job", "start", step=0)
    job = start("")
    ended(job)
    if outcome:
        note(tmp_path / "job", "end", outcome=outcome, reason="the reason")
    found = LocalLauncher(processes=1).find(job.job, job.handle)
    assert found is not None
    assert found.status().state is state
    if state is State.failed:
        assert found.status().detail


def test_job_is_not_taken_for_a_later_process_of_its_number(start: Callable[..., LaunchedJob], tmp_path: Path) -> None:
    job = start("")
    ended(job)
    own = f"{os.getpid()} of {psutil.Process().create_time() - 1}, place 0"
    found = LocalLauncher(processes=1).find(job.job, own)
    assert found is not None
    assert found.status().state.over
    found.stop()  # would end this process
    assert LocalLauncher(processes=1).find(job.job, "arn:aws:1") is None


def test_jobs_at_the_same_time_have_different_gpus(
    start: Callable[..., LaunchedJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    launcher = LocalLauncher(jobs=2)
    assert launcher.num_processes() == 2

    def variables(name: str, does: str) -> tuple[LaunchedJob, list[str]]:
        job = start(does, launcher, name)
        path = tmp_path / name / "variables"
        return job, until(lambda: path.read_text().split() if path.exists() and path.read_text() else None)

    first, gpus = variables("first", WAITS)
    assert gpus == ["2,3", "3"]
    second, gpus = variables("second", WAITS)
    assert gpus[0] == "6,7"
    until(lambda: (tmp_path / "first" / "listens").exists() or None)
    first.stop()
    ended(first)
    third, gpus = variables("third", "")
    assert gpus[0] == "2,3"
    second.stop()
    assert [ended(second), ended(third)] == [State.stopped, State.finished]
    assert LocalLauncher(jobs=8).num_processes() == 1
    assert LocalLauncher().num_processes() == 4


def test_launcher_refuses_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no script"):
        LocalLauncher().check([LaunchJob(name="a", script=tmp_path / "none.py")])
