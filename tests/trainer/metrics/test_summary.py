"""The summary: a strict JSON file, and a table that says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

from trainer.metrics.display import render
from trainer.metrics.jsonl import MetricsFile
from trainer.metrics.summary import summary_table, write_summary

PROGRESS = {"step": 30, "samples": 960, "tokens": 120000, "seconds": 60.0, "skipped": 0, "rollbacks": 0}
TIMES = {"compute_s": 30.0, "data_s": 10.0, "checkpoint_s": 0.0}


def test_summary_says_final_and_best(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step, val_loss in ((10, 1.5), (20, 1.25), (30, math.nan)):
            file.write(step, {"loss": 30.0 / step, "val_loss": val_loss, "val_accuracy": 0.5})
    summary = write_summary(
        tmp_path, reason="done", progress=PROGRESS, times=TIMES, peak_memory_mib=403.2, more={"parameters": 7}
    )
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["final_loss"], summary["final_val_loss"], summary["final_val_accuracy"]) == (1.0, None, 0.5)
    assert summary["best_val_loss"] == {"value": 1.25, "step": 20}
    assert "best_val_accuracy" not in summary
    assert summary["tokens_per_s"] == 2000.0
    assert summary["time_split"] == {"compute": 0.75, "data": 0.25, "checkpoint": 0.0}
    assert (summary["parameters"], summary["step"], summary["this_start_s"]) == (7, 30, 40.0)
    assert summary["files"] == {"metrics.jsonl": "metrics.jsonl"}


def test_summary_of_a_run_without_steps_is_written(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, reason="nothing to do", progress={}, times={}, peak_memory_mib=1.0)
    assert summary["final_loss"] is None
    assert "nothing to do" in render(summary_table(summary, tmp_path))


def test_summary_table_says_what_matters(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.write(30, {"loss": 1.0, "val_loss": 1.25})
    summary = write_summary(tmp_path, reason="done", progress=PROGRESS, times=TIMES, peak_memory_mib=403.2)
    text = render(summary_table(summary, tmp_path), width=200)
    for said in (
        "120,000  (2.00k per second over everything)",
        "0:01:00  (this start 0:00:40)",
        "1.2500  (best 1.2500 at step 30)",
        "compute 75.0%, data 25.0%",
        "403 MiB",
        f"{tmp_path}: summary.json, metrics.jsonl",
    ):
        assert said in text
