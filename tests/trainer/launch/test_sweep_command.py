"""`shardwright launch --multirun` as its user meets it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.launch.fakes import FakeLauncher, Fate
from trainer import checking
from trainer.cli import main
from trainer.commands import launch, multirun
from trainer.launch.base import State

ROOT = Path(__file__).resolve().parents[3]

TINY = '''"""A line through ten points; a job fails where a file says so."""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from strategies.base import Batch, LossTerms
from trainer import Trainer
from trainer.cli import run
from trainer.data.base import Data


@dataclass(kw_only=True)
class Line(Trainer):
    width: int = 1

    def make_model(self):
        return nn.Linear(1, self.width)

    def make_data(self):
        rows = [torch.tensor([float(i)]) / 10 for i in range(10)]
        return Data(train=rows, validation=rows[:4])

    def collate(self, samples, seeds):
        inputs = torch.stack(samples)
        return Batch(inputs={"input": inputs}, labels=2 * inputs + 1, num_targets=len(samples))

    def loss(self, outputs, batch):
        if self.width == 2 and Path("broken").exists():
            raise RuntimeError("it burns")
        return LossTerms(loss=((outputs - batch.labels) ** 2).sum() / self.width)


if __name__ == "__main__":
    run(Line, "trainer.max_steps=6", "trainer.log_every=1", "trainer.eval_every=3", "trainer.global_batch=2",
        "trainer.micro_batch=2", "logger=[]", "hooks=[]", "checkpoint.every=null")
'''


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_of_real_jobs_compares_them_and_runs_the_failed_one_again(tmp_path: Path) -> None:
    (tmp_path / "line.py").write_text(TINY)
    (tmp_path / "broken").touch()

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        words = ["-m", "--script", "line.py", "launcher.jobs=2", "launcher.processes=1", "--sweep-dir", "sweep"]
        words += ["optimizer.lr=1e-2,1e-1", "trainer.width=1,2", *more]
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "launch.py"), *words],
            capture_output=True, text=True, cwd=tmp_path, timeout=150, check=False,
        )  # fmt: skip

    wrong = command("trainer.widht=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(
        "ConfigError: the job optimizer.lr=0.01 trainer.width=1: Configuration: there is no key 'trainer.widht'."
    )
    assert wrong.stderr.count("\n") == 1
    assert not (tmp_path / "sweep").exists()

    first = command()
    assert (first.returncode, first.stderr) == (1, "")
    assert "sweep in sweep: 4 jobs, at most 2 at once" in first.stdout
    assert "2 failed: the same command with --rerun-failed runs them again" in first.stdout
    found = rows(tmp_path / "sweep")
    assert [row["state"] for row in found] == ["finished", "finished", "failed", "failed"]
    assert float(found[0]["val_loss"]) < float(found[1]["val_loss"])
    assert "it burns" in found[2]["why"]
    assert (tmp_path / "sweep" / "comparison.png").stat().st_size > 10_000
    assert len((tmp_path / "sweep" / found[0]["job"] / "metrics.jsonl").read_text().splitlines()) == 6

    (tmp_path / "broken").unlink()
    before = (tmp_path / "sweep" / found[0]["job"] / "events.jsonl").read_bytes()
    second = command("--rerun-failed")
    assert (second.returncode, second.stderr) == (0, "")
    assert "2 finished before, 2 failed before, run again" in second.stdout
    assert [row["state"] for row in rows(tmp_path / "sweep")] == ["finished"] * 4
    assert (tmp_path / "sweep" / found[0]["job"] / "events.jsonl").read_bytes() == before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeLauncher:
    launcher = FakeLauncher()
    monkeypatch.setattr(launch, "launcher_of", lambda words, flags: launcher)
    monkeypatch.setattr(checking, "refuse_wrong_jobs", lambda script, jobs: None)
    monkeypatch.setattr(multirun, "_POLL_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return launcher


def command(*words: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(["launch", *words])
    return end.value.code


def test_sweep_folder_is_the_same_for_the_same_command_only(fake: FakeLauncher, tmp_path: Path) -> None:
    assert command("-m", "seed=1,2", "launcher.jobs=1") == 0
    assert command("-m", "seed=1,2", "launcher.jobs=2", "--rerun-failed") == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert fake.started == ["000-seed-1", "001-seed-2"]
    assert command("-m", "seed=1,2", "trainer.max_steps=3") == 0
    assert command("-m", "seed=1,2", "--search", "optuna", "--trials", "2") == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_sweep_of_one_folder_is_refused_with_other_settings_and_hides_secrets(
    fake: FakeLauncher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "--sweep-dir", "mine", "seed=1,2"]
    assert command(*words, "logger.wandb.api_key=verysecret1") == 0
    assert "verysecret1" not in (tmp_path / "mine" / "sweep.json").read_text()
    assert json.loads((tmp_path / "mine" / "sweep.json").read_text())["about"]["launcher"] == "FakeLauncher"
    capsys.readouterr()
    assert command(*words, "logger.wandb.api_key=verysecret2") == 2
    err = capsys.readouterr().err
    assert "holds a sweep with another settings" in err
    assert "verysecret" not in err


def test_search_is_compared_by_what_was_asked_for(
    fake: FakeLauncher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fates = lambda values: Fate(loss=lambda step: float(values["x"]), ends=State.finished)
    search = ["--search", "optuna", "--trials", "6", "--pruner", "none", "--maximize", "--sweep-dir", "s"]
    assert command("-m", *search, "x=interval(0,1)") == 0
    values = [float(row["val_loss"]) for row in rows(tmp_path / "s")]
    assert values == sorted(values, reverse=True)
    assert len(values) == 6
    capsys.readouterr()
    assert command("-m", "x=1,2", "--objective", "val_accuracy") == 0
    assert "no job has a val_accuracy (--objective); there are: step, val_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rerun-failed", "seed=1"], "--rerun-failed needs --multirun."),
        (["--search", "grid"], "--search needs --multirun."),
        (["-m", "--trials", "3", "seed=1,2"], "--trials needs --search optuna."),
        (["-m", "--search", "optuna", "seed=1"], "--search optuna has nothing to look for."),
        (["-m", "--search", "optuna", "--trials", "0", "seed=1,2"], "--trials 0 is below 1."),
        (["-m", "--cfg", "job", "seed=1,2"], "--cfg doesn't go with --multirun."),
        (["-m", "seed=1,2", "run.dir=x"], "'run.dir=x' doesn't go with --multirun"),
        (["-m", "--search", "annealing", "seed=1,2"], "invalid choice: 'annealing'"),
    ],
)
def test_sweep_with_wrong_words_is_one_line_and_leaves_nothing(
    fake: FakeLauncher, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert command(*words) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith("ConfigError: ")
    assert err.count("\n") == 1
    assert not any(tmp_path.rglob("*/*"))


def test_sweep_of_a_script_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    from strategies.errors import ConfigError

    (tmp_path / "mute.py").write_text("")
    (tmp_path / "loud.py").write_text("raise SystemExit('no such thing')")
    for name, told in (("mute", "it never called trainer.run"), ("loud", "exit code 1: no such thing")):
        with pytest.raises(ConfigError, match=told):
            checking.refuse_wrong_jobs(tmp_path / f"{name}.py", {"a": ["seed=1"]})
