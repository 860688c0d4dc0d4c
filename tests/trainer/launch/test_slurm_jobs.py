"""Submitting, following and stopping, with stand-ins for Slurm's programs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.slurm_programs import Programs, described, programs
from trainer.cli import main
from trainer.launch import LaunchJob, SlurmLauncher, State, following
from trainer.launch.slurm_follow import SlurmWatch
from trainer.launch.slurm_job import SlurmJob
from trainer.launch.slurm_queue import Queue, members, read_jobs

__all__ = ["programs"]

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(following, "EVERY_S", 0.01)
    (tmp_path / "train.py").touch()
    return tmp_path


def job(folder: Path, *words: str) -> LaunchJob:
    return LaunchJob(name="mine", script=folder / "train.py", overrides=words, run_dir=folder / "runs" / "mine")


def launcher(**more: Any) -> SlurmLauncher:
    return SlurmLauncher(**{"processes": 1, **more})


def test_job_is_submitted_with_its_script_and_options_that_count_more_than_variables(
    here: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "slow")
    monkeypatch.setenv("MY_TOKEN", "sesame-open")
    started = launcher(partition="gpu", sbatch={"comment": "a 'b'"}).start(job(here, "x=1"))
    assert started.handle == "101"
    logs = here / "runs" / "mine" / "logs"
    assert programs.script == (logs / "slurm-101.sh").read_text()
    assert "sesame" not in programs.script
    assert programs.options[0] == "--parsable"
    assert {"--partition=gpu", "--comment=a 'b'", f"--output={logs}/slurm-%j.log", "--requeue"} <= {*programs.options}
    assert "MY_TOKEN=sesame-open" in (programs.folder / "environment").read_text()


def test_job_submitted_from_inside_of_a_job_takes_nothing_of_it_along(
    here: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_CPU_BIND", "cores")
    launcher().start(job(here))
    assert "SLURM_CPU_BIND=cores" in (programs.folder / "environment").read_text()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    launcher().start(job(here))
    seen = (programs.folder / "environment").read_text()
    assert "SLURM_CPU_BIND" not in seen
    assert "SLURM_CONF=/etc/slurm.conf" in seen


def test_refusal_of_sbatch_is_one_line(here: Path, programs: Programs) -> None:
    programs.refuse("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: No.\n")
    with pytest.raises(ConfigError) as error:
        launcher().start(job(here))
    assert str(error.value) == (
        "launch: sbatch refuses the job: invalid partition specified: x Batch job submission failed: No. "
        "See what it says (launcher)."
    )


def test_without_sbatch_the_command_says_so_and_exits_2(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")
    with pytest.raises(SystemExit) as end:
        main(["launch", "launcher=slurm", "launcher.processes=1", "--script", "train.py", "--name", "mine"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err == (
        "ConfigError: launch: there is no sbatch on this machine. Start from a login node of the cluster, or add "
        "--dry-run and take the script there (launcher=slurm).\n"
    )
    assert list(here.iterdir()) == [here / "train.py"], "nothing was written"


def test_dry_run_prints_the_script_and_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")
    with pytest.raises(SystemExit) as end:
        main(["launch", "launcher=slurm", "launcher.processes=1", "trainer.max_steps=5", "run.name=a b", "--dry-run"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert f"'run.dir='\"'\"'{here}/runs/a b'\"'\"''\n" in out
    assert "#SBATCH --job-name=a-b\n" in out
    assert f'#SBATCH --output="{here}/runs/a b/logs/slurm-%j.log"\n' in out
    assert list(here.iterdir()) == [here / "train.py"]


def test_dry_run_of_a_grid_prints_one_array(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--multirun", "--dry-run", "launcher=slurm", "launcher.processes=1", "--sweep-dir", "sweep"]
    with pytest.raises(SystemExit) as end:
        main(["launch", *words, "optimizer.lr=1e-3,1e-2", "seed=1,2"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "#SBATCH --array=0-3\n" in out
    assert "3) # 003-lr-0-01-seed-2\n" in out
    assert not (here / "sweep").exists()


# What Slurm says.


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("PENDING", "0:0", State.waiting),
        ("CONFIGURING", "0:0", State.waiting),
        ("REQUEUE_HOLD", "0:0", State.waiting),
        ("RUNNING", "0:0", State.running),
        ("COMPLETING", "0:0", State.running),
        ("COMPLETED", "0:0", State.finished),
        ("CANCELLED", "0:15", State.stopped),
        ("TIMEOUT", "0:0", State.stopped),
        ("PREEMPTED", "0:0", State.stopped),
        ("FAILED", "75:0", State.stopped),
        ("FAILED", "1:0", State.failed),
        ("NODE_FAIL", "1:0", State.failed),
        ("OUT_OF_MEMORY", "0:125", State.failed),
        ("SOMETHING_NEW", "0:0", State.running),
    ],
)
def test_state_of_slurm_has_a_meaning_here(state: str, code: str, expected: State) -> None:
    assert read_jobs(described(state, code=code))["101"].as_state() is expected


def test_jobs_of_an_array_are_told_apart() -> None:
    text = "\n".join([
        described("RUNNING", "103", ArrayJobId="101", ArrayTaskId="2"),
        described("PENDING", "101", ArrayJobId="101", ArrayTaskId="3-5,8%2", Reason="JobArrayTaskLimit"),
    ])  # fmt: skip
    found = read_jobs(text)
    assert sorted(found) == ["101_2", "101_3", "101_4", "101_5", "101_8"]
    assert (found["101_2"].detail, found["101_8"].detail) == ("n[1-2]", "JobArrayTaskLimit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0-2", [0, 1, 2]), ("0-6:3", [0, 3, 6]), ("1,3-4%1", [1, 3, 4]), ("N/A", [])],
)
def test_members_of_an_array_are_counted(text: str, expected: list[int]) -> None:
    assert members(text) == expected


def test_status_has_the_numbers_of_the_run_and_why_it_failed(here: Path, programs: Programs) -> None:
    started = launcher().start(job(here))
    folder = here / "runs" / "mine"
    programs.answer(described("PENDING", Reason="Resources"))
    assert (started.status().state, started.status().detail) == (State.waiting, "Resources")
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 2.5}\n')
    log = folder / "logs" / "slurm-101.log"
    log.write_text("--- before\nTrainingError: old\n--- now\nhello\nTrainingError: rank 1 burns\nsrun: error: x\n")
    programs.answer(described("FAILED", code="1:0"))
    status = launcher().find(job(here), "101").status()  # type: ignore[union-attr]
    assert (status.state, status.detail) == (State.failed, "TrainingError: rank 1 burns")
    assert status.metrics == {"step": 5, "loss": 2.5}


def test_controller_is_asked_once_in_ten_seconds_for_a_whole_array(here: Path, programs: Programs) -> None:
    programs.answer(described("RUNNING", ArrayJobId="101", ArrayTaskId="0-1"))
    now = [0.0]
    queue = Queue(now=lambda: now[0])
    asked: Callable[[], int] = lambda: (programs.folder / "calls").read_text().count("show job")  # noqa: E731
    for _ in range(5):
        for index in (0, 1):
            assert queue.look(f"101_{index}") is not None
    assert asked() == 1
    now[0] = 10.0
    queue.look("101_0")
    assert asked() == 2


def test_controller_that_is_silent_for_a_while_stops_no_sweep(here: Path, programs: Programs) -> None:
    programs.answer(described("RUNNING"))
    now = [0.0]
    queue = Queue(now=lambda: now[0])
    running = SlurmJob(job(here), "101", queue, here, here / "log")
    assert running.status().state is State.running
    (programs.folder / "silent").touch()
    now[0] = 500.0
    assert running.status().state is State.running
    now[0] = 1200.0
    with pytest.raises(ConfigError, match="Slurm can't be asked: Unable to contact slurm controller"):
        running.status()


def test_job_that_slurm_has_forgotten_is_known_by_the_accounting_or_by_its_run(here: Path, programs: Programs) -> None:
    folder = here / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(
        json.dumps({"event": event, "time": "2026-11-22T08:00:00+00:00", "outcome": outcome}) + "\n"
        for event, outcome in (("start", ""), ("end", "finished"))
    ))  # fmt: skip
    found = launcher().find(job(here), "101")
    assert found is not None
    assert found.status().state is State.finished
    programs.add("sacct", "echo '101|CANCELLED by 0|0:15'\n")
    found = launcher().find(job(here), "101")
    assert found is not None
    assert found.status().state is State.stopped
    programs.add("sacct", "exit 1\n")
    (folder / "events.jsonl").unlink()
    found = launcher().find(job(here), "101")
    assert found is not None
    assert found.status().state is State.stopped, "nobody noted an end: what it has saved is there"


def test_number_of_another_job_isn_t_taken_for_ours(here: Path, programs: Programs) -> None:
    programs.answer(described("RUNNING", name="theirs"))
    assert launcher().find(job(here), "101") is None
    assert launcher().find(job(here), "12 of 3.5, place 0") is None


def test_stop_of_a_running_job_tells_its_processes_and_forbids_the_requeue_then_ends_it(
    here: Path, programs: Programs
) -> None:
    programs.answer(described("RUNNING"))
    started = launcher().start(job(here))
    started.stop()
    assert programs.calls == ["scontrol update JobId=101 Requeue=0", "scancel --signal=TERM 101"]
    started.stop()
    assert programs.calls[2:] == ["scancel 101"]


def test_stop_of_a_waiting_job_takes_it_out_of_the_queue(here: Path, programs: Programs) -> None:
    programs.answer(described("PENDING"))
    launcher().start(job(here)).stop()
    assert programs.calls[-1] == "scancel 101"


def test_stop_of_a_job_that_is_over_does_nothing(here: Path, programs: Programs) -> None:
    programs.answer(described("COMPLETED"))
    launcher().start(job(here)).stop()
    assert programs.calls == []


# Following.


def followed(
    here: Path, programs: Programs, log: str, *answers: str, ask: Callable[[str], bool] | None = None
) -> tuple[int, str]:
    programs.answer(*answers)
    stream = io.StringIO()
    path = here / "log"
    path.write_text(log)
    running = SlurmJob(job(here), "101", Queue(), here / "runs" / "mine", path)
    watch = SlurmWatch(running, path, following.screen_for(stream))
    return following.follow_until_end(watch, ask), stream.getvalue()


def test_follow_shows_states_once_and_the_whole_log(here: Path, programs: Programs) -> None:
    log = "--- start\nstep=1/9 loss=1.5000 lr=0.001 eta=0:00:10\nhello \x1b[31m\nno newline at the end"
    code, out = followed(
        here, programs, log, described("PENDING", Reason="Priority"), described("PENDING", Reason="Priority"),
        described("RUNNING"), described("RUNNING"), described("PENDING", Reason="BeginTime").replace("Restarts=0",
        "Restarts=1"), described("RUNNING").replace("Restarts=0", "Restarts=1"), described("COMPLETED"),
    )  # fmt: skip
    assert code == 0
    states = [line for line in out.splitlines() if line.startswith(("waiting", "running", "finished"))]
    assert states == [
        "waiting: Priority",
        "running: n[1-2]",
        "waiting: BeginTime, started again 1 times",
        "running: n[1-2], started again 1 times",
        "finished",
    ]
    assert "step=1/9 loss=1.5000" in out
    assert "hello \N{REPLACEMENT CHARACTER}[31m\n" in out
    assert "\nno newline at the end\n" in out


@pytest.mark.parametrize(
    ("last", "log", "code", "says"),
    [
        (("FAILED", "2:0"), "--- x\nConfigError: Data: there is no file x (data.path).\nmore", 2, "there is no file x"),
        (("FAILED", "75:0"), "", 75, "the same command goes on"),
        (("FAILED", "1:0"), "--- x\nsrun: error: n1: task 0: Exited with exit code 1", 1, "task 0: Exited"),
        (("FAILED", "0:9"), "", 137, "failed"),
        (("TIMEOUT", "0:0"), "", 75, "launcher.stop_before"),
        (("CANCELLED", "0:0"), "", 75, "cancelled"),
        (("OUT_OF_MEMORY", "0:125"), "", 253, "out of memory"),
        (("NODE_FAIL", "0:0"), "", 1, "a node failed"),
    ],
)
def test_follow_ends_with_the_exit_code_that_the_job_s_end_means(
    here: Path, programs: Programs, last: tuple[str, str], log: str, code: int, says: str
) -> None:
    found, out = followed(here, programs, log, described(last[0], code=last[1]))
    assert found == code
    assert says in out


class Impatient:
    """Presses Ctrl-C in the pauses of these numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
        self._at, self._pauses = at, 0
        monkeypatch.setattr(SlurmWatch, "pause", self._pause)

    def _pause(self, wait_s: float) -> None:
        self._pauses += 1
        if self._pauses in self._at:
            raise KeyboardInterrupt


def test_ctrl_c_asks_and_no_leaves_the_job_alone(
    here: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Impatient(monkeypatch, 1)
    asked: list[str] = []
    code, out = followed(here, programs, "", described("RUNNING"), ask=lambda text: bool(asked.append(text)))
    assert (code, asked, programs.calls) == (130, ["Stop the job 101? [y/N] "], [])
    assert "the job goes on; to stop it: scancel --signal=TERM 101 (with a checkpoint)" in out


def test_ctrl_c_asks_and_yes_stops_the_job_and_again_ends_it(
    here: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Impatient(monkeypatch, 1, 2)
    asked: list[str] = []
    running = [described("RUNNING")] * 6
    code, out = followed(
        here, programs, "", *running, described("FAILED", code="75:0"), ask=lambda text: asked.append(text) is None
    )
    assert code == 75
    assert asked == ["Stop the job 101? [y/N] "] * 2
    assert programs.calls[1:] == ["scancel --signal=TERM 101", "scancel 101"]
    assert "stopping: with a checkpoint\nstopping: at once\n" in out


def test_ctrl_c_without_a_terminal_leaves_the_job_alone(
    here: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Impatient(monkeypatch, 1)
    assert followed(here, programs, "", described("RUNNING"))[0] == 130


def test_controller_that_is_silent_is_asked_again(here: Path, programs: Programs) -> None:
    programs.answer(described("RUNNING"))
    stream = io.StringIO()
    running = SlurmJob(job(here), "101", Queue(), here, here / "log")
    watch = SlurmWatch(running, here / "log", following.screen_for(stream))
    (programs.folder / "silent").touch()
    for _ in range(3):
        assert not watch.look_patiently()
    (programs.folder / "silent").unlink()
    assert not watch.look_patiently()
    assert stream.getvalue().count("The job goes on; asking again") == 1
    assert "running: n[1-2]" in stream.getvalue()


def test_run_follows_a_job_of_the_same_words_and_refuses_one_of_others(
    here: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher().start(job(here, "x=1"))
    (here / "runs" / "mine" / "logs" / "slurm-101.log").write_text("long ago\n")
    (programs.folder / "script").unlink()
    programs.answer(described("RUNNING"), described("COMPLETED"))
    assert launcher().run(job(here, "x=1")) == 0
    assert not (programs.folder / "script").exists(), "nothing was submitted"
    assert "long ago" not in capsys.readouterr().out
    programs.answer(described("RUNNING"))
    with pytest.raises(ConfigError, match=r"job 101 of this run is RUNNING, with other settings.*\(run.dir\)"):
        launcher().run(job(here, "x=2"))
    programs.answer(described("COMPLETED"))
    assert launcher().run(job(here, "x=2")) == 0
    assert (programs.folder / "script").exists()


def test_sweep_of_a_grid_is_one_array_and_its_jobs_are_found_again(
    here: Path, programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.commands.multirun._POLL_S", 0.01)
    monkeypatch.setattr("trainer.commands.multirun.check", lambda *given: None)
    words = ["launch", "--multirun", "launcher=slurm", "launcher.processes=1", "launcher.jobs=2", "--sweep-dir", "s"]
    words += ["optimizer.lr=1e-3,1e-2", "seed=1,2"]
    ends = (("0", "COMPLETED", "0:0"), ("1", "FAILED", "1:0"), ("2", "FAILED", "75:0"), ("3", "COMPLETED", "0:0"))
    programs.answer("\n".join(
        described(state, str(101 + int(index)), name="s", code=code, ArrayJobId="101", ArrayTaskId=index)
        for index, state, code in ends
    ))  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(words)
    out = capsys.readouterr().out
    assert end.value.code == 1, out
    assert "--array=0-3%2" in programs.options
    book = json.loads((here / "s" / "sweep.json").read_text())
    assert [(each["handle"], each["standing"]) for each in book["jobs"]] == [
        ("101_0", "finished"), ("101_1", "failed"), ("101_2", "stopped"), ("101_3", "finished"),
    ]  # fmt: skip
    (programs.folder / "script").unlink()
    programs.add("sbatch", 'cat > "$lab/script"; printf \'%s\\n\' "$@" > "$lab/options"; echo 202\n')
    programs.answer(described("COMPLETED", "202", name="s", ArrayJobId="202", ArrayTaskId="0"),
                    described("COMPLETED", "202", name="002-lr-0-01-seed-1"))  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main([*words, "--rerun-failed"])
    capsys.readouterr()
    assert "--array=0-1%2" in programs.options, "those that are left, alone"
    assert (here / "s" / "logs" / "slurm-202.sh").exists()
