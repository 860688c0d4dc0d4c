"""Whole runs: stopping and going on, the same curve however it is spread, and what happens when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.testing import Workers
from tests.trainer.jobs import ROWS, TINY, curve, fit, lines, losses, record_of


def run(
    workers: Workers, folder: Path, size: int, *overrides: str, trainer: str = "Trainer", refused: bool = False
) -> dict[str, Any]:
    """One start on `size` ranks, which must agree on how it ended; `refused`: it must have ended in an error."""
    base = TINY if trainer == "Trainer" else ROWS
    answers = workers.run(fit, size, str(folder), [*base, *overrides], trainer, timeout=150)
    for answer in answers[1:]:
        for key in ("error", "message", "stopped", "reason"):
            assert answer.get(key) == answers[0].get(key), "the ranks don't agree"
    assert ("error" in answers[0]) == refused, answers[0]
    return answers[0]


@pytest.mark.parametrize(("size", "killed"), [(1, 0), (2, 0), (2, 1)])
def test_fit_stopped_and_started_again_gives_the_same_bits(
    workers: Workers, tmp_path: Path, size: int, killed: int
) -> None:
    dropout = "model.config.attention_dropout=0.1"
    run(workers, tmp_path / "whole", size, dropout)
    stop = ("hooks=[killer,counter]", "hooks.killer.step=6", f"hooks.killer.rank={killed}")
    first = run(workers, tmp_path / "cut", size, dropout, *stop)
    assert first["stopped"]
    assert first["progress"]["step"] == 6
    assert len(lines(tmp_path / "cut")) == 6
    again = run(workers, tmp_path / "cut", size, dropout, "hooks=[counter]")
    assert not again["stopped"]
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(1, 13))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [line["grad_norm"] for line in lines(tmp_path / "cut")] == [
        line["grad_norm"] for line in lines(tmp_path / "whole")
    ]


def test_fit_killed_without_a_word_goes_on_from_its_last_checkpoint(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "whole", 2)
    run(workers, tmp_path / "cut", 2, "trainer.max_steps=8", "schedule=constant", "checkpoint.every=5")
    # As if it had died at step 8: the checkpoint of its end is gone, the lines of steps 6 to 8 are there.
    for path in (tmp_path / "cut" / "checkpoints" / "step-00000008").iterdir():
        if path.is_file():
            path.unlink()
    run(workers, tmp_path / "cut", 2, "schedule=constant")
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(1, 13))


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 4), (3, 2)])
def test_fit_resumed_at_another_world_size_goes_on_with_the_same_curve(
    workers: Workers, tmp_path: Path, first: int, second: int
) -> None:
    fp64 = "precision=fp64"
    run(workers, tmp_path / "whole", 1, fp64, "trainer.micro_batch=1")
    run(workers, tmp_path / "cut", first, fp64, "trainer.micro_batch=1", "hooks=[killer]")
    run(workers, tmp_path / "cut", second, fp64, "trainer.micro_batch=1")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-7)


def test_fit_gives_one_curve_however_the_global_batch_is_split(workers: Workers, tmp_path: Path) -> None:
    splits = [(1, 8), (2, 4), (4, 2), (2, 2)]
    curves, norms = [], []
    for size, micro_batch in splits:
        folder = tmp_path / f"{size}x{micro_batch}"
        keys = ("trainer.global_batch=8", f"trainer.micro_batch={micro_batch}", "trainer.max_steps=20")
        run(workers, folder, size, *keys, "precision=fp64", "optimizer.lr=5e-4")
        curves.append(losses(folder))
        norms.append([line["grad_norm"] for line in lines(folder)])
    for found, norm in zip(curves[1:], norms[1:], strict=True):
        assert found == pytest.approx(curves[0], abs=1e-7)
        assert norm == pytest.approx(norms[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_fit_with_uneven_masks_gives_one_curve_however_it_is_split(workers: Workers, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "a" * (n % 5)}, {"role": "assistant", "content": "b" * (n % 13)}]}
        for n in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    base = [word for word in TINY if not word.startswith("data")]
    keys = ["data=messages", f"data.files=[{tmp_path / 'chats.jsonl'}]", "data.packing=none", "data.length=40",
            "data.validation=0.2", "trainer.global_batch=8", "precision=fp64", "optimizer.lr=5e-4"]  # fmt: skip
    found = []
    for size, micro_batch in [(1, 8), (2, 2)]:
        words = [*base, *keys, f"trainer.micro_batch={micro_batch}"]
        answers = workers.run(fit, size, str(tmp_path / f"{size}"), words, timeout=150)
        assert "error" not in answers[0], answers[0]
        found.append(curve(tmp_path / f"{size}"))
    assert found[1] == [pytest.approx(line, rel=1e-5) for line in found[0]]
    for key in ("loss", "val_loss"):
        values = [[line[key] for line in one if key in line] for one in found]
        assert values[1] == pytest.approx(values[0], abs=1e-7)
        assert values[0]


def test_fit_in_fp32_gives_nearly_one_curve_however_it_is_split(workers: Workers, tmp_path: Path) -> None:
    curves = []
    for size, micro_batch in [(1, 8), (2, 2)]:
        folder = tmp_path / f"{size}"
        keys = ("trainer.global_batch=8", f"trainer.micro_batch={micro_batch}", "trainer.max_steps=20")
        run(workers, folder, size, *keys, "optimizer.lr=5e-4")
        curves.append(losses(folder))
    assert curves[1] == pytest.approx(curves[0], abs=5e-6)


def test_fit_finished_run_started_again_changes_nothing(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 1)
    before = lines(tmp_path / "run")
    again = run(workers, tmp_path / "run", 1)
    assert again["reason"] == "reached step 12 (trainer.max_steps)"
    assert lines(tmp_path / "run") == before


def test_fit_writes_the_files_of_a_run(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 2, "logger=[tensorboard,csv]", "checkpoint.every=4", "trainer.eval_every=6")
    folder = tmp_path / "run"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "summary.json", "logs/rank-0.log",
                 "logs/rank-1.log", "plots/loss.png", "plots/step_time.png"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    by_step = {line["step"]: line for line in lines(folder)}
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s"} <= by_step[3].keys()
    assert {"val_loss"} <= by_step[6].keys()
    assert {"val_loss"} <= by_step[12].keys()
    assert 0 <= 12 * 12 * 16 - by_step[12]["tokens"] < 16  # the last sample of the text may be a short one
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2


def test_fit_never_resuming_into_a_used_folder_is_refused(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 2)
    answer = run(workers, tmp_path / "run", 2, "resume=never", refused=True)
    assert answer["error"] == "ConfigError"
    assert "step-00000012" in answer["message"]


def test_fit_from_another_runs_checkpoint_branches_off(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "first", 1, "trainer.max_steps=6", "schedule=constant")
    run(workers, tmp_path / "second", 1, "schedule=constant", f"resume={tmp_path / 'first'}")
    assert [line["step"] for line in lines(tmp_path / "second")] == list(range(7, 13))
    assert len(lines(tmp_path / "first")) == 6


def test_fit_with_another_model_than_the_checkpoint_is_refused(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 2, "trainer.max_steps=2")
    answer = run(workers, tmp_path / "run", 2, "model.config.intermediate_size=48", refused=True)
    assert answer["error"] == "ConfigError"
    assert "shape" in answer["message"]


def test_fit_error_on_one_rank_is_everybodys(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 2, "trainer.broken_rank=1", trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError"
    assert "no such file" in answer["message"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.global_batch=7", "trainer.global_batch"),
        ("trainer.micro_batch=5", "trainer.micro_batch"),
        ("trainer.max_steps=null", "trainer.max_steps"),
        ("precision=tf32", "precision"),
        ("strategy=single", "strategy"),
        ("resume=/nowhere", "resume"),
        ("backend=nccl", "backend"),
        ("strategy.hook=bf16", "strategy.hook"),
        ("trainer.max_time=soon", "trainer.max_time"),
    ],
)
def test_fit_wrong_setting_is_refused_on_all_ranks(workers: Workers, tmp_path: Path, override: str, key: str) -> None:
    answer = run(workers, tmp_path / "run", 2, override, trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError", answer
    assert key in answer["message"]
    assert "\n" not in answer["message"]


def test_fit_nonfinite_step_is_skipped(workers: Workers, tmp_path: Path) -> None:
    answer = run(workers, tmp_path / "run", 2, "trainer.poisoned=41", trainer="Rows")
    assert answer["progress"]["step"] == 10
    assert answer["progress"]["skipped"] == 2  # once in each of two epochs of five steps
    found = losses(tmp_path / "run")
    assert found.count("NaN") == 2
    assert all(isinstance(loss, float) for loss in found[found.index("NaN") + 1 :][:2])  # the weights are unharmed


def test_fit_nonfinite_step_stops_where_asked(workers: Workers, tmp_path: Path) -> None:
    keys = ("trainer.poisoned=41", "trainer.on_nonfinite=stop")
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows", refused=True)
    assert answer["error"] == "TrainingError"
    assert "trainer.on_nonfinite" in answer["message"]


def test_fit_nonfinite_step_rolls_back_and_leaves_its_samples_out(workers: Workers, tmp_path: Path) -> None:
    keys = ("trainer.poisoned=41", "trainer.on_nonfinite=rollback", "checkpoint.every=1", "trainer.max_steps=5")
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    assert answer["progress"]["step"] == 5
    assert answer["progress"]["rollbacks"] >= 1
    assert answer["progress"]["samples"] > 60
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert all(isinstance(line["loss"], float) for line in lines(tmp_path / "run"))


def test_fit_hook_state_survives_a_restart(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "run", 1, "hooks=[killer,counter]", trainer="Rows")
    run(workers, tmp_path / "run", 1, "hooks=[counter]", trainer="Rows")
    assert record_of(tmp_path / "run", 10)["hooks"]["counter"] == {"seen": 10}


def test_fit_average_is_evaluated_and_survives_a_restart(workers: Workers, tmp_path: Path) -> None:
    ema = "trainer.ema_decay=0.9"
    run(workers, tmp_path / "whole", 2, ema)
    run(workers, tmp_path / "cut", 2, ema, "hooks=[killer]")
    run(workers, tmp_path / "cut", 2, ema)
    whole, cut = lines(tmp_path / "whole")[-1], lines(tmp_path / "cut")[-1]
    assert cut["ema_val_loss"] == whole["ema_val_loss"]
    assert cut["ema_val_loss"] != cut["val_loss"]


def test_fit_finds_a_micro_batch_that_all_ranks_agree_on(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "found", 2, "trainer.micro_batch=null")
    run(workers, tmp_path / "given", 2, "trainer.micro_batch=6")
    assert "micro-batch: 6 of 6" in (tmp_path / "found" / "logs" / "rank-0.log").read_text()
    assert losses(tmp_path / "found") == losses(tmp_path / "given")  # the search left no trace


@pytest.mark.parametrize(
    ("override", "steps"),
    [("trainer.max_epochs=1", 5), ("trainer.max_epochs=1.5", 8), ("trainer.max_tokens=120", 3)],
)
def test_fit_ends_at_the_limit(workers: Workers, tmp_path: Path, override: str, steps: int) -> None:
    answer = run(workers, tmp_path / "run", 2, override, "trainer.max_steps=null", trainer="Rows")
    assert answer["progress"]["step"] == steps
    assert override.partition("=")[0] in answer["reason"]


def test_fit_out_of_time_stops_with_a_checkpoint(workers: Workers, tmp_path: Path) -> None:
    keys = ("trainer.max_time=0.3s", "trainer.max_steps=1000000", "trainer.log_every=100000")
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows")
    assert answer["stopped"]
    assert "trainer.max_time" in answer["reason"]
    step = answer["progress"]["step"]
    assert record_of(tmp_path / "run")["progress"]["step"] == step


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fit_in_lower_precision_learns_and_resumes(workers: Workers, tmp_path: Path, precision: str) -> None:
    keys = (f"precision={precision}", "schedule=constant", "trainer.max_steps=6")
    run(workers, tmp_path / "run", 2, *keys)
    run(workers, tmp_path / "run", 2, *keys[:2])
    found = losses(tmp_path / "run")
    assert len(found) == 12
    assert found[-1] < found[0]


def test_fit_deterministic_mode_runs(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "one", 1, "deterministic=true")
    run(workers, tmp_path / "two", 1, "deterministic=true")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
