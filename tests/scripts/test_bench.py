"""The benchmark: its arithmetic, its page, and once the real thing, too short to mean anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.commands.jobs import ROOT
from trainer.bench import Bench, Case, Results, Saves, Taken, to_json, to_markdown
from trainer.bench.runs import saves_of, taken
from trainer.cli import main

EACH = os.environ.get("SHARDWRIGHT_BENCH") == "all"
"""Each hand-written loop, not one process's alone."""


def took(cpu_ms: float = 10.0, startup_s: float = 4.0) -> Taken:
    return Taken(cpu_ms_per_step=cpu_ms, tokens_per_s=1e4, startup_s=startup_s, peak_mib=400.0, loss=3.0, saves_s=[])


def test_taken_counts_warm_steps_of_all_ranks() -> None:
    ranks = [
        {"marks": [(1, 0.0, 0.0), (20, 9.0, 9.0), (30, 10.0, 9.5)], "first_step_at": 104.0, "peak_mib": 300.0,
         "loss": 2.5, "saves_s": [0.5, 1.0]},
        {"marks": [(1, 0.0, 0.0), (20, 9.0, 9.0), (30, 11.0, 9.3)], "first_step_at": 105.0, "peak_mib": 310.0,
         "loss": 2.6, "saves_s": [0.7, 0.9]},
    ]  # fmt: skip
    found = taken(ranks, launched=100.0, tokens_per_step=256)
    assert found.cpu_ms_per_step == pytest.approx(1000 * (0.5 + 0.3) / 10)
    assert found.tokens_per_s == pytest.approx(256 * 10 / 2.0), "the slowest rank's"
    assert (found.startup_s, found.peak_mib, found.loss) == (5.0, 310.0, 2.5)
    assert found.saves_s == [0.7, 1.0]


def test_saves_tells_overlapped_steps_from_quiet_ones() -> None:
    step_s = dict.fromkeys(range(1, 21), 1.0) | {11: 1.5, 12: 1.5}
    found = saves_of([{"step": 10, "seconds": 3.2, "stall_s": 0.2}], step_s)
    assert (found.seconds, found.stalls_s) == ([3.2], [0.2])
    assert found.overlapped_step_s == pytest.approx(1.5)
    assert found.quiet_step_s == 1.0


def test_page_holds_ours_against_the_mean_of_both_neighbours_and_shows_how_they_differ() -> None:
    found = Results(case=Case(model="tiny", processes=2, steps=30))
    for ours, before, after in ((11.0, 10.0, 12.0), (12.0, 8.0, 8.0), (10.0, 10.0, 10.0)):
        found.ours.append(took(ours, startup_s=4.5))
        found.before.append(took(before))
        found.after.append(took(after))
    found.loop_saves_s = [1.0, 1.0]
    found.background = Saves(seconds=[1.5, 1.5], stalls_s=[0.5, 0.1], quiet_step_s=1.0, overlapped_step_s=1.25)
    page = to_markdown([found], "a page")
    assert "| CPU time per step (ms) | 11.00 | 10.00 | 1.000 (1.000 .. 1.500) | 1.000 (1.000 .. 1.200) |" in page
    assert "| start-up, ours more (s) |  |  | +0.50 (+0.50 .. +0.50) | +0.00 (+0.00 .. +0.00) |" in page
    assert "| ours, checkpoint.async_save=true | 1.50 s | 0.10 s (first: 0.50 s) | 0.10 (first: 0.50) |" in page
    assert "(1.25 times)" in page
    assert "torch" in page
    assert json.loads(to_json([found]))["results"][0]["ours"][1]["cpu_ms_per_step"] == 12.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tyni"], "tiny"),
        (["--strategy", "fsdp"], "fsdp_full"),
        (["--rounds", "0"], "--rounds 0"),
        (["--strategy", "single", "--processes", "2"], "--processes 2"),
        (["--strategy", "fsdp_hybrid", "--processes", "3"], "a multiple of 2"),
        (["--processes", "1", "-2"], "--processes -2"),
    ],
)
def test_bench_wrong_is_refused_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *words])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ConfigError: bench: ")
    assert said in line


@pytest.mark.parametrize(("strategy", "processes"), [("single", "1"), *([("ddp", "2")] if EACH else [])])
def test_bench_trains_the_same_job_by_both(tmp_path: Path, strategy: str, processes: str) -> None:
    page = tmp_path / "new" / "page.md"
    words = ["--model", "tiny", "--processes", processes, "--strategy", strategy, "--precision", "bf16"]
    words += ["--rounds", "1", "--steps", "8", "--no-checkpoints"]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *words, "--output", str(page)],
        capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert page.read_text() == ended.stdout[:-1]
    assert ended.stderr.count("by hand") == 2
    [found] = json.loads(page.with_suffix(".json").read_text())["results"]
    losses = [found[side][0]["loss"] for side in ("before", "ours", "after")]
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=0.3), "the same model, data and optimizer, in another order"
    assert found["ours"][0]["peak_mib"] > 100


@pytest.fixture(scope="module")
def loss_by_ddp(tmp_path_factory: pytest.TempPathFactory) -> float:
    bench = Bench(tmp_path_factory.mktemp("ddp"), threads=1)
    return bench.loop(Case(model="tiny", processes=2, steps=8)).loss


@pytest.mark.skipif(not EACH, reason="trains for a minute: SHARDWRIGHT_BENCH=all")
@pytest.mark.parametrize("strategy", ["zero3", "fsdp_hybrid", "horovod"])
def test_loop_by_hand_trains_the_same_job(strategy: str, loss_by_ddp: float, tmp_path: Path) -> None:
    if library := {"zero3": "deepspeed", "horovod": "horovod"}.get(strategy):
        pytest.importorskip(library)
    case = Case(model="tiny", processes=2, steps=8, strategy=strategy)
    taken = Bench(tmp_path, threads=1).loop(case, saves=1)
    assert taken.loss == pytest.approx(loss_by_ddp, abs=1e-4)
    assert taken.saves_s[0] > 0
