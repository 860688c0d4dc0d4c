"""`plan`, `report` and the help of `train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.trainer.commands.jobs import command
from tests.trainer.jobs import TINY, fit


def plan(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, dict[str, int]]:
    from trainer.cli import main

    with pytest.raises(SystemExit) as end:
        main(["plan", f"run.dir={folder}", *words])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads((folder / "plan.json").read_text())
    assert f"{found['num_parameters']:,} parameters" in out
    rows = {row["strategy"]: row["bytes_per_rank"] for row in found["candidates"]}
    assert all(name in out for name in rows)
    return {**rows, "parameters": {"number": found["num_parameters"]}}


def test_plan_counts_the_model_that_would_be_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = plan(capsys, tmp_path, "--ranks", "4")
    assert found["parameters"]["number"] == 857_984  # with the vocabulary of the data's tokenizer
    assert {"ddp", "fsdp_full"} <= found.keys()
    assert "single" not in found, "it can't run on four ranks"
    number = 857_984
    assert found["ddp"]["weights"] == 4 * number
    assert found["ddp"]["moments"] == 8 * number


def test_plan_knows_the_optimizer_the_adapters_and_the_choice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = plan(capsys, tmp_path, "optimizer=sgd", "strategy=ddp")
    assert found["ddp"]["moments"] == 0
    assert "single" not in found
    adapters = plan(capsys, tmp_path, "model.lora.rank=2", "strategy=single")["single"]
    assert 0 < adapters["gradients"] < adapters["weights"] / 10


def test_report_finished_going_on_killed_and_torn(workers: Workers, tmp_path: Path) -> None:
    run = tmp_path / "run"
    [answer] = workers.run(fit, 1, str(run), [*TINY, "trainer.max_steps=4"])
    assert "error" not in answer, answer
    shutil.rmtree(run / "plots")

    def report() -> str:
        [(code, out, err)] = workers.run(command, 1, ["report", str(run)])
        assert (code, err) == (0, ""), err
        assert (run / "plots" / "loss.png").is_file()
        return str(out)

    out = report()
    assert "reached step 4" in out
    assert str(run / "plots" / "loss.png") in out
    assert "since" not in out

    with (run / "metrics.jsonl").open("a") as file:  # started again, and killed in the middle of a line
        file.write('{"step": 5, "loss": 1.25, "tokens": 12345.0}\n{"step": 6, "lo')
    out = report()
    assert "went on since: step 5, loss 1.2500" in out
    assert "reached step 4" in out

    (run / "summary.json").write_text('{"reason": ')
    out = report()
    assert "not ended yet, or killed: step 5" in out


def test_train_help_leaves_out_what_is_internal(workers: Workers) -> None:
    [(code, out, err)] = workers.run(command, 1, ["train", "--help"])
    assert (code, err) == (0, "")
    for line in ("\nstrategy: ", "checkpoint: default", "Exit codes:", "  max_steps: "):
        assert line in out
    assert "schema:" not in out
    assert "hydra:" not in out
    assert "HFModel" not in out


@pytest.mark.parametrize("word", ["--halp", "-z"])
def test_train_unknown_flag_is_one_line(workers: Workers, word: str) -> None:
    [(code, out, err)] = workers.run(command, 1, ["train", word])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err
