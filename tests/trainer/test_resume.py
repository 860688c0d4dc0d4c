"""A run that was stopped and started again, in every way that this may happen, learns what the unstopped one learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.trainer.jobs import curve, lines
from tests.trainer.test_fit import run


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        (1, ("data.workers=2", "trainer.eval_every=4")),
        (2, ("precision=fp16", "precision.growth_interval=2", "precision.loss_scale=4e9", "trainer.clip_norm=null")),
        (1, ("optimizer=adafactor", "trainer.log_every=3", "schedule=wsd")),
        (2, ("optimizer=sgd", "optimizer.momentum=0.9", "trainer.eval_every=2", "checkpoint.every=3")),
        (2, ("hooks=[samples]", "hooks.samples.length=3", "trainer.eval_every=3", "trainer.ema_decay=0.9")),
    ],
    ids=["workers", "fp16", "adafactor", "sgd", "average"],
)
def test_resume_gives_the_same_curve(workers: Workers, tmp_path: Path, size: int, keys: tuple[str, ...]) -> None:
    words = ("model.config.attention_dropout=0.1", *keys)
    run(workers, tmp_path / "whole", size, *words)
    sampling = "samples," if "hooks=[samples]" in keys else ""
    kill = (f"hooks=[{sampling}killer]", f"hooks.killer.at={'evaluate' if sampling else 'log'}")
    first = run(workers, tmp_path / "cut", size, *(word for word in words if word != "hooks=[samples]"), *kill)
    assert first["stopped"]
    assert first["progress"]["step"] == 6
    run(workers, tmp_path / "cut", size, *words)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_resume_stopped_before_the_first_step_begins_afresh(workers: Workers, tmp_path: Path) -> None:
    kill = ("hooks=[killer,ender]", "hooks.killer.at=start", "hooks.killer.step=0", "hooks.killer.rank=1")
    first = run(workers, tmp_path / "run", 2, *kill, trainer="Rows")
    assert first["stopped"]
    assert first["progress"]["step"] == 0
    again = run(workers, tmp_path / "run", 2, trainer="Rows")
    assert again["progress"]["step"] == 10
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 11))


def test_resume_stopped_run_doesnt_end(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 1, "hooks=[killer,ender]", trainer="Rows")
    assert not (tmp_path / "run" / "ended").exists()
    run(workers, tmp_path / "run", 1, "hooks=[ender]", trainer="Rows")
    assert (tmp_path / "run" / "ended").exists()


def test_resume_killed_in_the_last_evaluation_only_evaluates(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 2, trainer="Rows")
    whole = curve(tmp_path / "run")
    # As if it had been killed there: the checkpoint is written, the evaluation and the summary aren't.
    path = tmp_path / "run" / "metrics.jsonl"
    kept = [{key: value for key, value in line.items() if key != "val_loss"} for line in lines(tmp_path / "run")]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    (tmp_path / "run" / "summary.json").unlink()
    answer = run(workers, tmp_path / "run", 2, trainer="Rows")
    assert answer["progress"]["step"] == 10
    assert curve(tmp_path / "run") == whole


def test_resume_last_checkpoint_is_written_before_the_last_evaluation(workers: Workers, tmp_path: Path) -> None:
    keys = ("hooks=[killer]", "hooks.killer.at=evaluate", "hooks.killer.step=10", "trainer.failing_rank=-1")
    answer = run(workers, tmp_path / "run", 1, *keys, trainer="Rows")
    assert not answer["stopped"]
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert log.index("checkpoint at step 10") < log.index("val_loss")


def test_resume_killed_in_the_removal_after_the_last_checkpoint_removes_the_rest(
    workers: Workers, tmp_path: Path
) -> None:
    keys = ("checkpoint.every=3", "checkpoint.keep=2")
    run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000009", "step-00000010"}
    # As if it had been killed there: the manifest, which goes first, is gone.
    shutil.copytree(checkpoints / "step-00000009", checkpoints / "step-00000006")
    (checkpoints / "step-00000006" / "manifest.json").unlink()
    run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000009", "step-00000010"}


@pytest.mark.parametrize("batch", [20, 6])
def test_resume_with_another_global_batch_ends_after_the_same_samples(
    workers: Workers, tmp_path: Path, batch: int
) -> None:
    limit = ("trainer.max_steps=null", "trainer.max_epochs=2")
    first = run(workers, tmp_path / "run", 2, *limit, "hooks=[killer]", "hooks.killer.step=4", trainer="Rows")
    assert first["progress"]["samples"] == 48
    again = run(workers, tmp_path / "run", 2, *limit, f"trainer.global_batch={batch}", "trainer.micro_batch=1",
                trainer="Rows")  # fmt: skip
    assert again["progress"]["samples"] >= 120
    assert again["progress"]["samples"] < 120 + batch
    assert again["progress"]["step"] == 4 + -(-72 // batch)


def test_resume_says_what_changed_since_the_checkpoint_was_written(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 1, "trainer.max_steps=4", trainer="Rows")
    run(workers, tmp_path / "run", 1, "trainer.global_batch=7", trainer="Rows", refused=True)
    run(workers, tmp_path / "run", 1, "optimizer.lr=2e-2", trainer="Rows")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "changed since then: optimizer.lr: 0.01 -> 0.02" in log
    assert "changed since then: trainer.max_steps: 4 -> 10" in log
    assert "changed since then: trainer.global_batch" not in log


def test_resume_limit_below_the_checkpoint_does_nothing(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 1, trainer="Rows")
    before = curve(tmp_path / "run")
    answer = run(workers, tmp_path / "run", 1, "trainer.max_steps=4", trainer="Rows")
    assert answer["progress"]["step"] == 10
    assert not answer["stopped"]
    assert curve(tmp_path / "run") == before
