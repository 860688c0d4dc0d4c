"""When a profiler is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from strategies.errors import ConfigError
from strategies.timing import phase
from strategies.world import World
from trainer.metrics.clock import StepClock
from trainer.profiling.base import AbstractProfiler, Recording, Window
from trainer.profiling.torch_profiler import TorchProfiler


@dataclass(kw_only=True)
class Noting(AbstractProfiler):
    """Notes what it is told."""

    warm: int = 0
    broken: bool = False
    taken: bool = False

    def lead(self) -> int:
        return self.warm

    def recording(self, world: World, folder: Path) -> Recording:
        return Notes(self)


class Notes(Recording):
    seen: list[str]

    def __init__(self, profiler: Noting) -> None:
        self._profiler = profiler

    def mark(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext(self.seen.append(name))

    def start(self, first: int) -> None:
        if self._profiler.taken:
            raise RuntimeError("Profiler is already enabled on this thread")
        self.seen.append(f"on before {first}")

    def step(self) -> None:
        self.seen.append("step")

    def stop(self, *, keep: bool) -> str:
        self.seen.append("kept" if keep else "dropped")
        if self._profiler.broken:
            raise OSError("no space left on device")
        return "written"


def run(
    profiler: Noting, steps: range, *, total: int | None = 100, rank: int = 0, ends: bool = True
) -> tuple[list[str], list[str]]:
    """What is noted and said in steps `steps` of a run, which are all of this start."""
    said: list[str] = []
    Notes.seen = noted = []
    world: Any = SimpleNamespace(rank=rank, size=2)
    window = Window(profiler, world, Path("run"), StepClock(), said.append)
    window.begin(steps.start - 1, total)
    for step in steps:
        noted.append(str(step))
        window.advance(step)
    window.close(keep=ends)
    window.close(keep=False)
    return noted, said


def test_window_is_on_for_its_steps_alone() -> None:
    noted, said = run(Noting(start=3, steps=2), range(1, 6))
    assert noted == ["1", "2", "on before 3", "3", "step", "4", "step", "kept", "5"]
    assert said == ["profiler: records steps 3 to 4 on rank 0, below run/profiles", "profiler: written"]


def test_window_marks_phases_while_it_is_on() -> None:
    profiler, Notes.seen = Noting(start=2, steps=1), []
    world: Any = SimpleNamespace(rank=0, size=2)
    window = Window(profiler, world, Path("run"), StepClock(), lambda _: None)
    window.begin(0, None)
    for step in range(1, 4):
        with phase(f"forward {step}"):
            window.advance(step)
    assert Notes.seen == ["on before 2", "forward 2", "step", "kept"]


def test_window_warms_up_before_its_first_step() -> None:
    noted, _ = run(Noting(start=3, steps=1, warm=1), range(1, 5))
    assert noted == ["1", "on before 2", "2", "step", "3", "step", "kept", "4"]


def test_window_opens_at_once_where_there_is_no_time_to_warm_up() -> None:
    noted, _ = run(Noting(start=2, steps=1, warm=5), range(1, 4))
    assert noted == ["on before 1", "1", "step", "2", "step", "kept", "3"]


def test_window_counts_the_steps_of_earlier_starts() -> None:
    noted, said = run(Noting(start=3, steps=4), range(5, 8))
    assert noted == ["on before 5", "5", "step", "6", "step", "kept", "7"]
    assert said[0] == "profiler: records steps 5 to 6 (the rest is past) on rank 0, below run/profiles"


def test_window_of_steps_that_are_past_says_so() -> None:
    noted, said = run(Noting(start=3, steps=2), range(5, 7))
    assert noted == ["5", "6"]
    assert said == [
        "profiler: steps 3 to 4 are past, the run goes on after step 4: nothing is recorded (profiler.start)"
    ]


def test_window_beyond_the_end_says_so() -> None:
    noted, said = run(Noting(start=30, steps=1), range(1, 3), total=20)
    assert noted == ["1", "2"]
    [line] = said
    assert "step 30 come after the end at step 20" in line
    assert "profiler.start" in line


def test_window_that_the_end_cuts_says_so_and_keeps_what_there_is() -> None:
    noted, said = run(Noting(start=2, steps=5), range(1, 4), total=3)
    assert noted == ["1", "on before 2", "2", "step", "3", "step", "kept"]
    assert said[0].startswith("profiler: records steps 2 to 3 (there the run ends) on")


@pytest.mark.parametrize(("ends", "outcome"), [(True, "kept"), (False, "dropped")])
def test_window_is_closed_when_the_run_ends_early(ends: bool, outcome: str) -> None:
    noted, _ = run(Noting(start=2, steps=50), range(1, 4), ends=ends)
    assert noted == ["1", "on before 2", "2", "step", "3", "step", outcome]


def test_window_leaves_other_ranks_alone() -> None:
    noted, said = run(Noting(start=2, steps=1, ranks=[1]), range(1, 4))
    assert noted == ["1", "2", "3"]
    assert said == ["profiler: records steps 2 to 2 on rank 1, below run/profiles"]
    noted, _ = run(Noting(start=2, steps=1, ranks=[1]), range(1, 4), rank=1)
    assert "on before 2" in noted


def test_window_goes_on_where_the_result_cannot_be_written() -> None:
    noted, said = run(Noting(start=2, steps=1, broken=True), range(1, 4))
    assert noted[-1] == "3"
    assert said[-1] == "profiler: the result can't be written: OSError: no space left on device"


def test_window_goes_on_where_the_profiler_cannot_start() -> None:
    noted, said = run(Noting(start=2, steps=1, taken=True), range(1, 4))
    assert noted == ["1", "2", "3"]
    assert "it can't start, nothing is recorded: RuntimeError: Profiler is already enabled" in said[-1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"start": 0}, "start=0 is out of range"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"steps": 101}, "steps=101 is out of range. Choose 1 to 100"),
        ({"ranks": []}, r"ranks=\[\]"),
        ({"ranks": [0, 0]}, r"ranks=\[0, 0\]"),
        ({"ranks": [-1]}, r"ranks=\[-1\]"),
        ({"warmup": -1}, "warmup=-1"),
        ({"top": 0}, "top=0"),
        ({"max_mib": 0}, "max_mib=0"),
    ],
    ids=str,
)
def test_profiler_with_a_bad_setting_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        TorchProfiler(**settings)
    assert "\n" not in str(caught.value)
    assert f"(profiler.{next(iter(settings))})" in str(caught.value)


def test_profiler_of_a_rank_that_is_not_there_is_refused() -> None:
    world: Any = SimpleNamespace(size=2)
    TorchProfiler(ranks=[1]).refuse_world(world)
    with pytest.raises(ConfigError, match="names rank 2, and the run has ranks 0 to 1"):
        TorchProfiler(ranks=[0, 2]).refuse_world(world)
