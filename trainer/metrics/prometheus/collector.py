"""What one rank answers to a scrape."""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from strategies.world import World
from trainer.metrics.memory import host_memory
from trainer.metrics.prometheus.catalogue import BY_NAME, COUNTED, COUNTER, FAMILIES, PREFIX, Family, exposed

if TYPE_CHECKING:
    from prometheus_client import Metric

_exposed = functools.cache(exposed)


class Collector:
    """Written by the training thread and read by the endpoint's, without locks: each number is replaced whole.

    A scrape reads what was noted here, and the kernel's books of this process; never the device, nor a disk that may
    hang. What costs more is looked up when a step is logged.

    Args:
        world: whose `rank` is a label of every number, and whose device is looked after.
        folder: the run's, whose name is the label `run`.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self._labels = {"run": folder.name, "rank": str(world.rank)}
        self._info = {
            "world_size": str(world.size),
            "device": world.device.type,
            "host": platform.node(),
            "version": _version(),
        }
        self._device = world.device
        self._folder = folder
        self._process = psutil.Process()
        self._values = {family.name: 0.0 for family in FAMILIES if family.kind == COUNTER}
        self._more: dict[str, Family] = {}
        """Logged numbers that the catalogue doesn't know."""
        self._logged: dict[str, float] = {}
        self._step = 0
        now = time.time()
        self._set(start_timestamp_seconds=now, last_progress_timestamp_seconds=now, saving=0, world_size=world.size)
        if self._device.type == "cuda":
            self._set(device_memory_size_bytes=torch.cuda.get_device_properties(self._device).total_memory)
        self._look_around()

    def _set(self, **values: float | None) -> None:
        self._values.update({PREFIX + name: float(value) for name, value in values.items() if value is not None})

    def start(self, entries: Mapping[str, Any]) -> None:
        """The first step of this start comes next; `entries` say where from, and how."""
        self._step = entries["step"]
        self._logged = {name: entries[name] for name in COUNTED}
        self._info["strategy"] = entries["strategy"]
        self._set(step=self._step, final_step=entries["final_step"], restarts=entries["restarts"])

    def advance(self, step: int) -> None:
        """Something was done; `step` may be the one that was already known."""
        if step > self._step:
            self._values[f"{PREFIX}steps_total"] += step - self._step
        self._step = step
        self._values[f"{PREFIX}step"] = step
        self._values[f"{PREFIX}last_progress_timestamp_seconds"] = time.time()

    def log(self, numbers: Mapping[str, float]) -> None:
        """Numbers of a logged step or an evaluation."""
        for name, value in numbers.items():
            if name in COUNTED:
                self._values[COUNTED[name]] += max(0.0, value - self._logged.get(name, 0.0))
                self._logged[name] = value
            if (family := _exposed(name)) is not None:
                if family.name not in BY_NAME:
                    self._more[family.name] = family
                self._values[family.name] = family.factor * value
        self._look_around()

    def saving(self, *, now: bool) -> None:
        """Training begins or ends to wait for a checkpoint."""
        self._set(saving=now)

    def saved(self, entries: Mapping[str, Any]) -> None:
        """A checkpoint is complete; `entries` as in `events.jsonl`."""
        self._values[f"{PREFIX}checkpoints_total"] += 1
        self._set(
            last_checkpoint_step=entries["step"],
            last_checkpoint_timestamp_seconds=time.time(),
            last_checkpoint_duration_seconds=entries["seconds"],
            last_checkpoint_stall_seconds=entries["stall_s"],
            last_checkpoint_size_bytes=entries["bytes"] or None,  # only rank 0 knows
        )

    def rolled_back(self, step: int) -> None:
        """The run goes on after `step`; steps that are done again count again."""
        self._values[f"{PREFIX}rollbacks_total"] += 1
        self._step = step
        self._set(step=step)

    def _look_around(self) -> None:
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(self._folder)
            self._set(disk_free_bytes=disk.free, disk_size_bytes=disk.total)
        if self._device.type == "cuda":  # the allocator's own count: no message to the device
            self._set(device_memory_used_bytes=torch.cuda.memory_allocated(self._device))

    def collect(self) -> Iterator[Metric]:
        """In any thread, at any time."""
        from prometheus_client import Metric

        values = dict(self._values) | self._of_the_process()
        for name, family in (BY_NAME | self._more).items():
            if name in values:
                metric = Metric(name.removesuffix("_total"), family.help, family.kind)
                metric.add_sample(name, self._labels, values[name])
                yield metric
        info = BY_NAME[f"{PREFIX}run_info"]
        metric = Metric(info.name, info.help, info.kind)
        metric.add_sample(info.name, self._labels | self._info, 1)
        yield metric

    def _of_the_process(self) -> dict[str, float]:
        available, size = host_memory()
        resident = float(self._process.memory_info().rss)
        found = {
            "process_cpu_seconds_total": time.process_time(),
            "process_memory_bytes": resident,
            "host_memory_available_bytes": available,
            "host_memory_size_bytes": size,
        }
        if self._device.type != "cuda":
            found |= {"device_memory_used_bytes": resident, "device_memory_size_bytes": size}
        return {PREFIX + name: value for name, value in found.items()}


def _version() -> str:
    try:
        return version("shardwright")
    except PackageNotFoundError:  # a checkout that isn't installed
        return "unknown"
