"""What happens to all ranks when something goes wrong on one, or on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.trainer.jobs import ROWS, curve, fit, fit_each, lines, record_of
from tests.trainer.test_fit import run


def test_fault_in_the_loss_of_one_rank_ends_all_and_says_which(workers: Workers, tmp_path: Path) -> None:
    words = [*ROWS, "trainer.failing_rank=1"]
    sound, broken = workers.outcomes(fit, 2, str(tmp_path / "run"), words, "Rows", timeout=60)
    assert broken.error == "ValueError"
    assert sound.error is None, sound
    assert sound.value["error"] == "TrainingError"
    assert "rank 1: ValueError: a mistake in the loss" in sound.value["message"]
    assert "rank-1.log" in sound.value["message"]
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_fault_hook_that_speaks_on_one_rank_only_ends_the_run_on_all(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 2, "hooks=[quitter]", trainer="Rows")
    assert answer["reason"] == "rank 1 has had enough"
    assert not answer["stopped"]
    assert answer["progress"]["step"] == 3


def test_fault_two_runs_in_one_process_keep_their_folders(workers: Workers, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for answers in workers.run(fit_each, 2, folders, list(ROWS), "Rows", timeout=60):
        assert [answer["progress"]["step"] for answer in answers] == [10, 10]
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    for name in ("a", "b"):
        assert (tmp_path / name / "logs" / "rank-1.log").is_file()


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_fault_fp16_with_a_policy_that_its_loss_scale_contradicts_is_refused(
    workers: Workers, tmp_path: Path, policy: str
) -> None:
    keys = ("precision=fp16", f"trainer.on_nonfinite={policy}")
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError"
    assert "trainer.on_nonfinite" in answer["message"]


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_fault_damaged_newest_checkpoint_is_passed_over_and_all_ends_the_same(
    workers: Workers, tmp_path: Path, async_save: str
) -> None:
    keys = ("checkpoint.every=5", f"checkpoint.async_save={async_save}", "trainer.dropout=0.2", "schedule=constant")
    run(workers, tmp_path / "whole", 2, *keys, "trainer.max_steps=12", trainer="Rows")
    run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    (shard,) = (tmp_path / "run" / "checkpoints" / "step-00000010").rglob("__1_0.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    run(workers, tmp_path / "run", 2, *keys, "trainer.max_steps=12", trainer="Rows")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    text = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "step-00000010" in text
    assert "going back to step-00000005" in text


def test_fault_no_whole_checkpoint_is_one_line_on_all_ranks_and_changes_nothing(
    workers: Workers, tmp_path: Path
) -> None:
    run(workers, tmp_path / "run", 2, trainer="Rows")
    (shard,) = (tmp_path / "run" / "checkpoints").rglob("__1_0.distcp")
    shard.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    answer = run(workers, tmp_path / "run", 2, "trainer.max_steps=12", trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError", answer
    assert "__1_0.distcp is missing" in answer["message"]
    assert "\n" not in answer["message"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_fault_metrics_that_cant_be_written_dont_end_the_run(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 2, "hooks=[filler]", trainer="Rows")
    assert answer["progress"]["step"] == 10
    assert "metrics.jsonl can't be written" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("name", ["logs/rank-1.log", "config.yaml", "events.jsonl"])
def test_fault_folder_that_cant_be_written_is_refused_on_all_ranks(workers: Workers, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)  # a folder where a file is to be
    answer = run(workers, tmp_path / "run", 2, trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError", answer
    assert "run.dir" in answer["message"]


def test_fault_folder_that_another_run_holds_is_refused(workers: Workers, tmp_path: Path) -> None:
    from filelock import FileLock

    folder = tmp_path / "a run über alles"
    words = list(ROWS)
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        answers = workers.run(fit, 2, str(folder), words, "Rows", timeout=60)
    assert [answer["error"] for answer in answers] == ["ConfigError"] * 2
    assert "another run" in answers[0]["message"]
    answers = workers.run(fit, 2, str(folder), words, "Rows", timeout=60)  # what is left of the lock holds nobody up
    assert answers[0]["progress"]["step"] == 10
    assert len(lines(folder)) == 10


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        (("trainer.num_validation=0",), 10),
        (("trainer.num_validation=1", "trainer.eval_every=3", "trainer.eval_samples=99"), 10),
        (("trainer.num_samples=5", "trainer.eval_every=4"), 10),
        (("trainer.num_samples=5", "trainer.num_validation=1", "trainer.eval_every=3", "strategy=fsdp_full"), 10),
        (("trainer.num_samples=1", "trainer.max_steps=null", "trainer.max_epochs=30"), 3),
    ],
)
def test_fault_little_data_is_enough(workers: Workers, tmp_path: Path, keys: tuple[str, ...], steps: int) -> None:
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    assert answer["progress"]["step"] == steps
    assert ("val_loss" in lines(tmp_path / "run")[-1]) == ("trainer.num_validation=0" not in keys)


def test_fault_no_training_data_is_refused(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 2, "trainer.num_samples=0", trainer="Rows", refused=True)
    assert "no sample" in answer["message"]


def test_fault_limit_without_end_is_refused(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 1, "trainer.max_epochs=.inf", trainer="Rows", refused=True)
    assert "trainer.max_epochs" in answer["message"]


def test_fault_rollback_on_two_ranks_goes_back_everywhere(workers: Workers, tmp_path: Path) -> None:
    keys = ("trainer.poisoned=41", "trainer.on_nonfinite=rollback", "checkpoint.every=2", "trainer.ema_decay=0.5",
            "hooks=[counter]", "trainer.dropout=0.2", "trainer.max_steps=null", "trainer.max_epochs=1")  # fmt: skip
    run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    record = record_of(tmp_path / "run")
    assert record["hooks"]["counter"]["seen"] == len(steps)
    assert record["progress"]["rollbacks"] == 1
    assert record["progress"]["samples"] == 60
