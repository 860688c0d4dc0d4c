"""torch's own profiler: a timeline of operators, kernels and phases, and a table of the costliest operators."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from strategies.world import World
from trainer.metrics.logs import LOGGER
from trainer.profiling.base import AbstractProfiler, Recording

if TYPE_CHECKING:
    from torch.profiler import ProfilerAction

_MIB = 2**20


@final
@dataclass(kw_only=True)
class TorchProfiler(AbstractProfiler):
    """Writes `profiles/rank-N.pt.trace.json.gz` and `profiles/rank-N.operators.txt` into the run's folder."""

    warmup: int = 2
    """Steps before the first in which it is on already, since being turned on slows a step; they aren't kept."""
    shapes: bool = False
    """Also the shapes of each operator's inputs; the table then has a row for each."""
    memory: bool = False
    """Also what each operator allocates and frees."""
    stacks: bool = False
    """Also the lines of Python that called each operator; slows the recorded steps several times."""
    top: int = 20
    """Rows of the table."""
    max_mib: int = 256
    """A larger timeline (compressed) is thrown away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse("warmup", self.warmup, 0, 100)
        self._refuse("top", self.top, 1, 1000)
        self._refuse("max_mib", self.max_mib, 1, None)

    def lead(self) -> int:
        return self.warmup

    def recording(self, world: World, folder: Path) -> Recording:
        return _TorchRecording(self, world, folder)


class _TorchRecording(Recording):
    def __init__(self, wanted: TorchProfiler, world: World, folder: Path) -> None:
        self._wanted, self._world, self._folder = wanted, world, folder

    def mark(self, name: str) -> AbstractContextManager[Any]:
        from torch.profiler import record_function

        return record_function(name)

    def start(self, first: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it starts and stops
        on_device = self._world.device.type == "cuda"
        self._opened, self._first = first, max(first, self._wanted.start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that warming up is better
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])],
                schedule=self._action,
                record_shapes=self._wanted.shapes,
                profile_memory=self._wanted.memory,
                with_stack=self._wanted.stacks,
                acc_events=True,
            )
            self._profile.step_num = first  # so that the timeline counts as the run does
            self._profile.start()

    def _action(self, step: int) -> ProfilerAction:
        from torch.profiler import ProfilerAction

        step, last = max(step, self._opened), self._wanted.start + self._wanted.steps - 1
        if step < self._first:
            return ProfilerAction.WARMUP
        if step < last:
            return ProfilerAction.RECORD
        return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.NONE

    def step(self) -> None:
        self._profile.step()

    def stop(self, *, keep: bool) -> str:
        last = self._profile.step_num - 1
        self._profile.stop()
        if not keep or last < self._first:
            return ""
        return self._write(last)

    def _write(self, last: int) -> str:
        name = f"rank-{self._world.rank}"
        self._folder.mkdir(parents=True, exist_ok=True)
        timeline, table = self._folder / f"{name}.pt.trace.json.gz", self._folder / f"{name}.operators.txt"
        on_device = self._world.device.type == "cuda"
        averages = self._profile.key_averages(group_by_input_shape=self._wanted.shapes)
        text = averages.table(
            sort_by="self_device_time_total" if on_device else "self_cpu_time_total",
            row_limit=self._wanted.top,
            max_name_column_width=60,
        )
        table.write_text(f"Steps {self._first} to {last}, rank {self._world.rank}\n{text}\n")
        LOGGER.info("operators of steps %d to %d\n%s", self._first, last, text)
        unfinished = self._folder / f".{timeline.name}"
        try:
            self._profile.export_chrome_trace(str(unfinished))
            size = unfinished.stat().st_size
            if size > self._wanted.max_mib * _MIB:
                return (
                    f"the timeline of steps {self._first} to {last} has {size / _MIB:.0f} MiB and was thrown away; "
                    f"record fewer steps, or allow more (profiler.steps, profiler.max_mib). Operators: {table}"
                )
            unfinished.replace(timeline)
        finally:
            unfinished.unlink(missing_ok=True)
        return (
            f"steps {self._first} to {last}: {timeline} (open it in https://ui.perfetto.dev, or its folder in "
            f"TensorBoard with torch-tb-profiler), costliest operators: {table}"
        )
