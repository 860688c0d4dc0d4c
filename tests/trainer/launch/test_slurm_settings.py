"""What the Slurm launcher refuses before anything is written or sent, each in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from trainer.commands.launch import SCRIPT, launcher_of, run_of
from trainer.launch import LaunchJob, SlurmLauncher
from trainer.launch.slurm_limits import as_slurm, whole_seconds

GIVEN: dict[str, Any] = {"processes": 2}


def check(*words: str, **settings: Any) -> SlurmLauncher:
    launcher = SlurmLauncher(**{**GIVEN, **settings})
    launcher.check([LaunchJob(name="run", script=SCRIPT, overrides=words)])
    return launcher


@pytest.mark.parametrize(
    ("given", "seconds", "slurm"),
    [
        ("90s", 90, "0-00:01:30"),
        ("90m", 5400, "0-01:30:00"),
        ("1.5h", 5400, "0-01:30:00"),
        ("2d", 172800, "2-00:00:00"),
        ("36:00:00", 129600, "1-12:00:00"),
        ("1-12:00:00", 129600, "1-12:00:00"),
    ],
)
def test_time_is_read_in_our_forms_and_slurm_s(given: str, seconds: int, slurm: str) -> None:
    assert whole_seconds(given, "launcher.time") == seconds
    assert as_slurm(seconds) == slurm


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes": 0}, "nodes=0 is not in 1 to"),
        ({"processes": 0}, "processes=0"),
        ({"processes": None}, "launcher.gpus_per_node=8"),
        ({"gpus_per_node": 0}, "gpus_per_node=0"),
        ({"processes": 9, "gpus_per_node": 8}, "processes=9 of a node have gpus_per_node=8"),
        ({"cpus_per_process": 0}, "cpus_per_process=0"),
        ({"max_requeues": -1}, "max_requeues=-1"),
        ({"jobs": 0}, "jobs=0"),
        ({"partition": "g pu"}, "partition='g pu' can't be Slurm's"),
        ({"partition": "gpu;rm"}, "launcher.partition"),
        ({"account": "a b"}, "launcher.account"),
        ({"qos": ""}, "launcher.qos"),
        ({"constraint": "a b"}, "launcher.constraint"),
        ({"time": "30"}, "Write 30m (minutes, as sbatch means it)"),
        ({"time": "soon"}, "time='soon' is no duration"),
        ({"time": "1:30"}, "HH:MM:SS"),
        ({"time": "1-24:00:00"}, "23 hours"),
        ({"time": "10:61:00"}, "59 minutes"),
        ({"time": "0s"}, "no time at all"),
        ({"time": "5m"}, "time=5m leaves no time to train"),
        ({"time": "10m", "stop_before": "9.5m"}, "launcher.time, launcher.stop_before"),
        ({"stop_before": "60"}, "launcher.stop_before"),
        ({"stop_before": "1d"}, "more than 18 hours"),
        ({"sbatch": {"p": "gpu"}}, "sbatch.p is no option"),
        ({"sbatch": {"--mem": "0"}}, "sbatch.--mem is no option"),
        ({"sbatch": {"partition": "gpu"}}, "is said by launcher.partition here"),
        ({"sbatch": {"requeue": ""}}, "is said by launcher.max_requeues here"),
        ({"sbatch": {"output": "x"}}, "is said by run.dir here"),
        ({"sbatch": {"gpus-per-task": "1"}}, "launcher.gpus_per_node"),
        ({"sbatch": {"wrap": "true"}}, "would break what the script does"),
        ({"sbatch": {"comment": "a\nb"}}, "isn't one line"),
        ({"srun": {"ntasks": "3"}}, "is said by launcher.nodes and launcher.processes here"),
        ({"srun": {"container-image": "x"}}, "is said by launcher.container_image here"),
        ({"srun": {"label": ""}}, "would break"),
        ({"setup": ["a\nb"]}, "isn't one line of shell"),
        ({"setup": [" "]}, "isn't one line of shell"),
        ({"setup": ["export HF_TOKEN=abcdef"]}, "holds a secret"),
        ({"environment": {"A B": "x"}}, "is no variable's name"),
        ({"environment": {"RANK": "0"}}, "RANK is set in the job by itself"),
        ({"environment": {"SLURM_NTASKS": "1"}}, "is set in the job by itself"),
        ({"environment": {"A": "x\ny"}}, "isn't one line"),
        ({"environment": {"WANDB_API_KEY": "abcdef"}}, "WANDB_API_KEY is a secret"),
        ({"container_mounts": ["/a:/b"]}, "and no container"),
        ({"container_image": " "}, "is no image"),
        ({"container_image": "x", "container_mounts": ["/a:b"]}, "is no mount"),
        ({"container_image": "x", "container_mounts": ["/a,/b"]}, "is no mount"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(**settings)
    assert said in str(error.value)
    assert str(error.value).startswith("launch: "), str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(").")
    assert "abcdef" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.api_token=abcdef"], "model.api_token is a secret"),
        (["data.url=s3://user:abcdef@host/x"], "data.url is a secret"),
        (["run.dir=${oc.env:SCRATCH}/x"], "where is run.dir=${oc.env:SCRATCH}/x?"),
        (["run.name=${oc.env:USER}"], "(run.dir)"),
    ],
)
def test_word_that_a_script_can_t_hold_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(*words)
    assert said in str(error.value)
    assert "abcdef" not in str(error.value)


def test_secret_read_from_elsewhere_is_fine() -> None:
    check("model.api_token=${oc.env:TOKEN}", setup=["export HF_TOKEN=$(cat ~/.token)", 'export A_TOKEN="$OTHER"'])


def test_secret_of_this_terminal_in_a_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "sesame-open")
    with pytest.raises(ConfigError, match=r"data.path is a secret.*\(data.path\)"):
        check("data.path=/data/sesame-open")


def test_script_that_isn_t_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no script"):
        SlurmLauncher(processes=1).check([LaunchJob(name="x", script=tmp_path / "none.py")])


def test_folder_that_slurm_can_t_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"can't be the place of a job's log.*\(run.dir\)"):
        SlurmLauncher(processes=1).check([LaunchJob(name="x", script=SCRIPT, run_dir=Path("a\\b"))])


def test_command_line_makes_a_launcher_with_lists_and_further_options() -> None:
    words = ["launcher=slurm", "launcher.processes=2", "launcher.setup=['module load a','module load b']",
             "launcher.sbatch.mem=0", "launcher.srun.mpi=pmix", "launcher.environment.NCCL_DEBUG=INFO"]  # fmt: skip
    launcher = launcher_of(words, {})
    assert isinstance(launcher, SlurmLauncher)
    assert launcher.sbatch == {"mem": "0"}
    assert launcher.srun == {"mpi": "pmix"}
    assert launcher.setup == ["module load a", "module load b"]
    with pytest.raises(ConfigError, match="partitoin"):
        launcher_of(["launcher=slurm", "launcher.partitoin=x"], {})


@pytest.mark.parametrize(
    ("words", "given", "name", "folder"),
    [
        (["run.dir=/x/y"], None, "y", "/x/y"),
        (["run.name=mine"], None, "mine", "runs/mine"),
        ([], "mine", "mine", "runs/mine"),
        (["run.dir=/x/y"], "mine", "mine", "/x/y"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_run_s_folder_is_what_the_words_say(
    words: list[str], given: str | None, name: str, folder: str, own: bool, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py" if own else SCRIPT
    assert run_of(script, words, given) == (name, Path(folder))
