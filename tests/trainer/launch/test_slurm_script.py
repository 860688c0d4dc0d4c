"""The batch script: what stands in it, that bash reads it as it was meant, and what it does with its processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.launch.slurm_programs import Programs, described, programs
from trainer.launch import LaunchJob, SlurmLauncher
from trainer.launch.slurm_script import directive

__all__ = ["programs"]

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "slurm.sh"
ODD = ("model.name='a \"b\" $HOME `id` \\ c'", "data.path=it's", "x=[1, 2]", "y=*", "", "-z=#!&;|<>", "ü=…")
SHOW = """#!/bin/sh
printf '%s\\n' "$@" > "$OUT.$SLURM_PROCID"
env > "$OUT.env.$SLURM_PROCID"
"""


def job(folder: Path, *words: str, script: str = "train.sh") -> LaunchJob:
    return LaunchJob(name="mine", script=folder / script, overrides=words, run_dir=folder / "runs" / "mine")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shellcheck(text: str) -> None:
    """As far as it is at hand. Dollars in single quotes and commas in options are meant."""
    if shutil.which("shellcheck"):
        words = ["shellcheck", "-s", "bash", "-e", "SC2016,SC2054", "-"]
        said = subprocess.run(words, input=text, text=True, capture_output=True, check=False)
        assert said.returncode == 0, said.stdout


def test_script_is_the_golden_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = SlurmLauncher(
        nodes=2, gpus_per_node=8, cpus_per_process=12, exclusive=True, partition="gpu", account="nlp", qos="high",
        constraint="p5|p4d", time="1d", sbatch={"mem": "0", "comment": "it's #1", "reboot": ""}, srun={"mpi": "pmix"},
        setup=["module load cuda"], environment={"NCCL_DEBUG": "INFO", "NOTE": "a $b 'c'"},
        container_image="/fsx/image.sqsh", container_mounts=["/fsx/data:/data:ro", "/scratch"],
    )  # fmt: skip
    monkeypatch.setattr("trainer.launch.slurm._OURS", here / "checkout")
    text = launcher.shown(job(here, "trainer.max_steps=9", "model.name='a $b'")).replace(str(here), "/fsx/me") + "\n"
    assert text == GOLDEN.read_text(), f"if that is meant: write it to {GOLDEN}\n{text}"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    shellcheck(text)


def test_container_mounts_what_the_job_needs_unless_it_is_there(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    far = tmp_path_factory.mktemp("elsewhere")
    for given, expected in (([], f"{here}:{here},{far}:{far}"), ([str(far)], f"{far}:{far},{here}:{here}")):
        launcher = SlurmLauncher(processes=1, container_image="x#y:1", container_mounts=given)
        mine = LaunchJob(name="mine", script=far / "train.py", run_dir=here / "runs" / "mine")
        assert f"    --container-mounts={expected}\n" in launcher.shown(mine)


@pytest.mark.parametrize("text", ["plain", "it's", 'a "b" #c', "a\\b", "$HOME `id`", "tab\there"])
def test_directive_is_quoted_as_sbatch_reads_it(text: str) -> None:
    """Its reader: a backslash takes the next character as it is, in quotes too; a blank outside of them ends it."""
    read, quoted, plain = "", False, iter(directive(("comment", text)))
    for character in plain:
        if character == "\\":
            read += next(plain)
        elif character == '"':
            quoted = not quoted
        else:
            assert quoted or character not in "'# \t"
            read += character
    assert (read, quoted) == (f"--comment={text}", False)


@dataclass
class Lab:
    """Runs scripts as Slurm would, with the stand-ins."""

    programs: Programs
    folder: Path

    def begin(self, launcher: SlurmLauncher, text: str, *words: str, tasks: int = 1, **more: Any) -> Any:
        script = self.folder / "train.sh"
        script.write_text(text)
        script.chmod(0o755)
        batch = launcher.shown(job(self.folder, *words)).replace(" -u ", " ")  # the training script is sh's here
        variables = {"SLURM_JOB_ID": "101", "SLURM_JOB_NODELIST": "n1", "LAB_TASKS": str(tasks),
                     "OUT": str(self.folder / "out"), "RANK": "stale", **more}  # fmt: skip
        path = self.folder / "batch.sh"
        path.write_text(batch)
        return subprocess.Popen(
            ["bash", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **variables},
        )  # fmt: skip

    def end(self, process: Any) -> tuple[int, str]:
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def run(self, *given: Any, **more: Any) -> tuple[int, str]:
        return self.end(self.begin(*given, **more))

    def wait_for(self, path: Path) -> None:
        end = time.monotonic() + 20
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert path.exists()


@pytest.fixture
def lab(programs: Programs, here: Path) -> Lab:
    programs.add("sleep", "exec /bin/sleep 0.5\n")  # half a minute is long
    return Lab(programs, here)


def launcher(**more: Any) -> SlurmLauncher:
    return SlurmLauncher(processes=1, python="/bin/sh", **more)


def test_words_and_variables_arrive_as_they_were_given(lab: Lab) -> None:
    given = {"NOTE": "a $b 'c' \"d\" \\", "MASTER_PORT": "29500"}
    code, out = lab.run(launcher(environment=given, setup=["export FROM_SETUP=1"]), SHOW, *ODD)
    assert code == 0, out
    folder = lab.folder / "runs" / "mine"
    assert (lab.folder / "out.0").read_text().splitlines() == [*ODD, f"run.dir={folder}", "run.name=null"]
    seen = dict(line.partition("=")[::2] for line in (lab.folder / "out.env.0").read_text().splitlines())
    assert (seen["NOTE"], seen["MASTER_PORT"], seen["FROM_SETUP"]) == (given["NOTE"], "29500", "1")
    assert seen["SHARDWRIGHT_GRACE_S"] == "300"
    assert "RANK" not in seen
    assert list((folder / "logs").iterdir()) == [], "what the processes noted is taken away"


def test_processes_share_the_cores_unless_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    for settings, threads in (
        ({}, cores),
        ({"cpus_per_process": 3}, 3),
        ({"environment": {"OMP_NUM_THREADS": "5"}}, 5),
    ):
        assert lab.run(launcher(**settings), SHOW)[0] == 0
        assert f"OMP_NUM_THREADS={threads}\n" in (lab.folder / "out.env.0").read_text()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 75", 75),
        ("kill -KILL $$", 137),
        ('[ "$SLURM_PROCID" = 1 ] && kill -KILL $$; /bin/sleep 0.2; exit 1', 1),
        ("exit 2", 2),
        ('[ "$SLURM_PROCID" = 1 ] && exit 2; /bin/sleep 100', 2),
        ('[ "$SLURM_PROCID" = 1 ] && exit 1; /bin/sleep 0.2; exit 2', 2),
        ('[ "$SLURM_PROCID" = 1 ] && exit 127; /bin/sleep 100', 137),
        ('[ "$SLURM_PROCID" = 0 ] && /bin/sleep 1; exit 75', 75),
        ('[ "$SLURM_PROCID" = 0 ] && /bin/sleep 1; exit 0', 0),
    ],
)
def test_exit_code_is_that_of_the_processes(lab: Lab, text: str, code: int) -> None:
    found, out = lab.run(launcher(), text, tasks=2)
    assert found == code, out
    assert lab.programs.calls == []


LISTENS = 'trap "exit {code}" USR1; : > "$OUT.$SLURM_PROCID.up"; for i in $(seq 200); do /bin/sleep 0.05; done; exit 9'


def told(lab: Lab, given: SlurmLauncher, code: int, **more: Any) -> tuple[int, str]:
    """With a SIGUSR1, as Slurm sends it before the end."""
    process = lab.begin(given, LISTENS.format(code=code), tasks=2, **more)
    for path in (lab.folder / "out.0.up", lab.folder / "out.1.up", lab.programs.folder / "step"):
        lab.wait_for(path)
    process.send_signal(signal.SIGUSR1)
    return lab.end(process)


def test_time_that_is_up_reaches_all_processes_and_the_job_is_requeued(lab: Lab) -> None:
    code, out = told(lab, launcher(max_requeues=3), 75, SLURM_RESTART_COUNT="2")
    assert (code, lab.programs.calls) == (75, ["scontrol requeue 101"]), out
    assert "started again 2 times" in out
    assert "waits to go on" in out


def test_job_of_an_array_is_requeued_alone(lab: Lab) -> None:
    told(lab, launcher(), 75, SLURM_ARRAY_JOB_ID="101", SLURM_ARRAY_TASK_ID="7")
    assert lab.programs.calls == ["scontrol requeue 101_7"]


@pytest.mark.parametrize(
    ("settings", "restarts", "code", "ends", "says"),
    [
        ({"max_requeues": 2}, "2", 75, 75, "not again, after 2 times (launcher.max_requeues)"),
        ({"max_requeues": 0}, "0", 75, 75, "not again, after 0 times"),
        ({}, "0", 0, 0, ""),
        ({}, "0", 1, 1, ""),
        ({}, "0", 2, 2, ""),
    ],
)
def test_job_isn_t_requeued_after_the_last_time_nor_without_a_stop(
    lab: Lab, settings: dict[str, Any], restarts: str, code: int, ends: int, says: str
) -> None:
    found, out = told(lab, launcher(**settings), code, SLURM_RESTART_COUNT=restarts)
    assert (found, lab.programs.calls) == (ends, []), out
    assert says in out


@pytest.mark.parametrize(("text", "ends"), [("exit 1", 1), ("kill -KILL $$", 137), ("exit 2", 2), ("exit 75", 75)])
@pytest.mark.parametrize("answers", [True, False])
def test_job_of_which_a_node_is_gone_is_requeued(lab: Lab, text: str, ends: int, answers: bool) -> None:
    lab.programs.silence_nodes(not answers)
    code, out = lab.run(launcher(), text, SLURM_JOB_NUM_NODES="2")
    failed = ends not in (2, 75)
    assert (code, lab.programs.calls) == (ends, ["scontrol requeue 101"] if failed and not answers else []), out
    assert ("launch: a node doesn't answer; the job waits to go on" in out) == (failed and not answers)


@pytest.mark.parametrize(("since", "requeued"), [("2026-11-22T08:00:00", True), ("None", False)])
def test_job_whose_place_is_taken_is_requeued_but_not_one_that_was_told_to_stop(
    lab: Lab, since: str, requeued: bool
) -> None:
    lab.programs.answer(described("RUNNING", PreemptTime=since))
    code, out = lab.run(launcher(), "exit 75")
    assert (code, lab.programs.calls) == (75, ["scontrol requeue 101"] if requeued else []), out
    assert ("a job of higher priority takes its place; the job waits to go on" in out) == requeued


def test_job_that_was_cancelled_is_not_asked_to_start_again(lab: Lab) -> None:
    """Slurm would do it."""
    lab.programs.silence_nodes(True)
    process = lab.begin(launcher(), LISTENS.format(code=1), tasks=2, SLURM_JOB_NUM_NODES="2")
    for path in (lab.folder / "out.0.up", lab.folder / "out.1.up", lab.programs.folder / "step"):
        lab.wait_for(path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # bash may lose one of two that come at the same moment
    process.send_signal(signal.SIGUSR1)
    code, out = lab.end(process)
    assert (code, lab.programs.calls) == (1, []), out


def test_requeue_that_slurm_refuses_ends_as_stopped(lab: Lab) -> None:
    lab.programs.add("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1\n")
    code, out = told(lab, launcher(), 75)
    assert code == 75
    assert "waits to go on" not in out


def test_time_that_is_up_before_the_start_starts_nothing(lab: Lab) -> None:
    code, out = lab.run(launcher(setup=["kill -USR1 $$"]), SHOW)
    assert (code, lab.programs.calls) == (75, ["scontrol requeue 101"]), out
    assert not (lab.folder / "out.0").exists()


def test_too_many_starts_end_the_job(lab: Lab) -> None:
    code, out = lab.run(launcher(max_requeues=3), SHOW, SLURM_RESTART_COUNT="4")
    assert code == 1
    assert "launch: started again more than 3 times (launcher.max_requeues)." in out


def test_set_up_that_fails_ends_the_job_with_its_line(lab: Lab) -> None:
    code, out = lab.run(launcher(setup=["true", "module_x load cuda", "echo never"]), SHOW)
    assert code == 2
    assert "launch: the set-up failed at: module_x load cuda (launcher.setup)." in out
    assert "never" not in out


def test_folder_that_isn_t_on_the_node_ends_the_job(lab: Lab) -> None:
    (lab.folder / "runs").write_text("no folder")
    code, out = lab.run(launcher(), SHOW)
    assert code == 2
    assert "can't be written here; is it on a disk that all nodes share? (run.dir)" in out


def test_srun_is_told_what_it_would_not_hand_down(lab: Lab) -> None:
    assert lab.run(launcher(cpus_per_process=3, srun={"mpi": "pmix", "verbose": ""}), SHOW)[0] == 0
    expected = ["--cpus-per-task=3", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--mpi=pmix", "--verbose"]
    assert (lab.programs.folder / "srun").read_text().splitlines() == expected


def test_on_hyperpod_srun_repeats_the_step(lab: Lab, tmp_path: Path) -> None:
    """The script looks for the folder itself, so it is told of another one."""
    given = launcher().shown(job(lab.folder))
    assert "if [[ -d /opt/sagemaker_cluster ]]; then" in given
    assert "options+=(--auto-resume=1)" in given


def test_array_has_the_words_of_each_job(here: Path, programs: Programs) -> None:
    jobs = [
        LaunchJob(name=name, script=here / "train.sh", overrides=(word,), folder=here / "sweep" / name)
        for name, word in (("000-a", "x='1 $2'"), ("001-b", "x=it's"))
    ]
    given = SlurmLauncher(processes=1, python="/bin/sh", jobs=3)
    text = given.shown_array(jobs)
    for line in ("--array=0-1%3", f"--output={here}/sweep/logs/slurm-%A_%a.log", "--job-name=sweep"):
        assert f"#SBATCH {line}\n" in text
    shellcheck(text)
    (here / "train.sh").write_text(SHOW)
    for index, name, word in ((0, "000-a", "x='1 $2'"), (1, "001-b", "x=it's")):
        variables = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": f"{7 + index}",
                     "LAB_TASKS": "1", "OUT": str(here / name)}  # fmt: skip
        said = subprocess.run(["bash"], input=text.replace(" -u ", " "), text=True, env={**os.environ, **variables},
                              capture_output=True, check=False, timeout=60)  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert (here / f"{name}.0").read_text().splitlines()[:2] == [word, f"run.dir={here}/sweep/{name}"]
