"""torch's profiler on real steps: what is in its files, and that nothing of it stays on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strategies.testing import Workers
from strategies.timing import phase
from tests.trainer import jobs
from trainer.metrics.clock import StepClock
from trainer.profiling import torch_profiler
from trainer.profiling.base import Window
from trainer.profiling.torch_profiler import TorchProfiler

WORLD: Any = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))


def profiled(folder: Path, profiler: TorchProfiler, steps: int = 6) -> list[str]:
    """What is said of `steps` steps, each with a forward and a backward."""
    said: list[str] = []
    window = Window(profiler, WORLD, folder, StepClock(), said.append)
    weight = torch.ones(8, 8, requires_grad=True)
    window.begin(0, None)
    for step in range(1, steps + 1):
        with phase("forward"):
            loss = (weight @ weight).square().sum()
        with phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        window.advance(step)
    window.close(keep=True)
    return said


def timeline(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    with gzip.open(folder / "profiles" / f"rank-{rank}.pt.trace.json.gz") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def steps_in(events: list[dict[str, Any]]) -> list[str]:
    return sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


def test_torch_profiler_writes_its_steps_and_their_phases(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = profiled(tmp_path, TorchProfiler(start=3, steps=2, warmup=1))
    events = timeline(tmp_path)
    assert steps_in(events) == ["ProfilerStep#3", "ProfilerStep#4"]
    names = [event["name"] for event in events]
    for name in ("forward", "backward", "aten::mm"):
        assert name in names, f"{name} isn't in the timeline"
    assert names.count("forward") == 2
    table = (tmp_path / "profiles" / "rank-0.operators.txt").read_text()
    assert table.startswith("Steps 3 to 4, rank 0\n")
    assert "aten::mm" in table
    assert sorted(path.name for path in (tmp_path / "profiles").iterdir()) == [
        "rank-0.operators.txt",
        "rank-0.pt.trace.json.gz",
    ]
    assert "perfetto" in said[-1]
    assert not torch._C._autograd._profiler_enabled()
    assert capfd.readouterr() == ("", ""), "torch talks on the console"


def test_torch_profiler_at_the_first_step_records_it(tmp_path: Path) -> None:
    profiled(tmp_path, TorchProfiler(start=1, steps=1, warmup=0), steps=2)
    assert steps_in(timeline(tmp_path)) == ["ProfilerStep#1"]


def test_torch_profiler_cut_by_the_end_keeps_what_it_has(tmp_path: Path) -> None:
    said = profiled(tmp_path, TorchProfiler(start=2, steps=50, warmup=1, top=1), steps=3)
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= set(steps_in(timeline(tmp_path)))
    assert "steps 2 to 3: " in said[-1]
    table = (tmp_path / "profiles" / "rank-0.operators.txt").read_text()
    assert sum("%" in line for line in table.splitlines()[1:]) == 2, "the heading and one operator"


def test_torch_profiler_that_only_warmed_up_writes_nothing(tmp_path: Path) -> None:
    said = profiled(tmp_path, TorchProfiler(start=6, steps=1, warmup=4), steps=4)
    assert not (tmp_path / "profiles").exists()
    assert len(said) == 1


@pytest.mark.parametrize(("option", "mark"), [("shapes", "Input Dims"), ("memory", "[memory]"), ("stacks", ".py(")])
def test_torch_profiler_option_shows(tmp_path: Path, option: str, mark: str) -> None:
    profiled(tmp_path / "plain", TorchProfiler(start=1, steps=1, warmup=0), steps=1)
    profiled(tmp_path / "more", TorchProfiler(start=1, steps=1, warmup=0, **{option: True}), steps=1)
    assert mark not in json.dumps(timeline(tmp_path / "plain"))
    assert mark in json.dumps(timeline(tmp_path / "more"))


def test_torch_profiler_too_large_a_timeline_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_profiler, "_MIB", 100)
    said = profiled(tmp_path, TorchProfiler(start=1, steps=1, max_mib=1))
    assert "was thrown away" in said[-1]
    assert "profiler.max_mib" in said[-1]
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["rank-0.operators.txt"]


def test_run_with_a_profiler_records_on_its_rank_and_goes_on(workers: Workers, tmp_path: Path) -> None:
    words = [*jobs.ROWS, "trainer.micro_batch=6", "profiler=torch", "profiler.start=4", "profiler.steps=2",
             "profiler.ranks=[1]"]  # fmt: skip
    folder = tmp_path / "run"
    workers.run(jobs.fit, 2, str(tmp_path / "plain"), words[:-4], "Rows")
    workers.run(jobs.fit, 2, str(folder), words, "Rows")
    assert jobs.losses(folder) == jobs.losses(tmp_path / "plain"), "a profiler changes nothing"
    assert {path.name for path in (folder / "profiles").iterdir()} == {
        "rank-1.operators.txt",
        "rank-1.pt.trace.json.gz",
    }
    events = timeline(folder, 1)
    names = [event["name"] for event in events]
    assert steps_in(events) == ["ProfilerStep#4", "ProfilerStep#5"]
    assert {"data", "forward", "backward", "step"} <= set(names)
    assert any(name.startswith("gloo:all_reduce") for name in names), "communication isn't in the timeline"
    assert names.count("step") == 2
    workers.run(jobs.fit, 2, str(folder), [*words, "trainer.max_steps=12", "profiler.start=11"], "Rows")
    assert steps_in(timeline(folder, 1)) == ["ProfilerStep#11", "ProfilerStep#12"], "counted over all starts"
    workers.run(jobs.fit, 2, str(folder), [*words, "trainer.max_steps=14"], "Rows")
    assert "steps 4 to 5 are past" in (folder / "logs" / "rank-0.log").read_text()


def test_run_with_a_profiler_that_cannot_be_is_refused(workers: Workers, tmp_path: Path) -> None:
    for words, complaint in (
        (["profiler=nsight"], "needs a CUDA device"),
        (["profiler=torch", "profiler.ranks=[2]"], "names rank 2"),
    ):
        heard = workers.run(jobs.fit, 2, str(tmp_path / "run"), [*jobs.ROWS, *words], "Rows")
        assert all(complaint in each["message"] for each in heard), heard
        assert all(each["error"] == "ConfigError" for each in heard)
