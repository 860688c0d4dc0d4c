"""What a run is predicted to take, beside what it takes: made when it starts, compared when it ends."""

from __future__ import annotations

import copy
import functools
import gc
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from strategies.base import Batch, LossFunction, ModelSpec, Plan, Strategy, WorldSpec
from strategies.ec2 import instance_type
from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.instances import instances
from trainer.metrics.memory import MIB, peak_memory_mib
from trainer.metrics.text import byte_size
from trainer.planner.calibrate import Calibration
from trainer.planner.cluster import Cluster
from trainer.planner.efficiency import Efficiency
from trainer.planner.memory import memory
from trainer.planner.trace import trace
from trainer.planner.work import FILE, Rates, Work, to_json

_TIMES = ("step_s", "data_s", "compute_s", "communication_s", "communication_total_s")


@dataclass(kw_only=True)
class Prediction:
    """Of one run, and what was measured of it since."""

    memory_bytes: int
    """Of a rank at its highest: what its tensors take on its device; of the whole process on a CPU."""
    step_s: float | None
    """None: not known how fast this device, or what connects it, is."""
    work: Work | None = None
    factors: Efficiency | None = None
    _windows: list[dict[str, float]] = field(default_factory=list)

    def describe(self) -> str:
        """One line for people."""
        time = "" if self.step_s is None else f" and {self.step_s:.3g} s per step"
        return f"predicted: {byte_size(self.memory_bytes)} per rank at most{time}"

    def note(self, window: Mapping[str, float]) -> None:
        """Means over some steps, from `StepClock.window`."""
        if "step_s" in window:
            self._windows.append({name: window[name] for name in _TIMES if name in window})

    def beside(self, peak_mib: float) -> dict[str, Any]:
        """For the run's summary.

        Args:
            peak_mib: the most that any rank took, in MiB.
        """
        later = self._windows[1:]  # the first has what happens once: kernels chosen, memory taken, moments made
        measured: dict[str, float] = {"memory_bytes": round(peak_mib * MIB)}
        for name in _TIMES:
            if known := [window[name] for window in later if name in window]:
                measured[name] = statistics.median(known)
        predicted = {"memory_bytes": self.memory_bytes, "step_s": self.step_s}
        errors = {
            name: 100 * (value / measured[name] - 1)
            for name, value in predicted.items()
            if value is not None and measured.get(name)
        }
        return {"predicted": predicted, "measured": measured, "prediction_error_percent": errors}

    def write(self, folder: Path) -> None:
        """`prediction.json`, if times were predicted."""
        if self.work is not None and self.factors is not None:
            (folder / FILE).write_text(json.dumps(to_json(self.work, self.factors)))


def foresee(
    strategy: Strategy,
    spec: ModelSpec,
    batch: Batch,
    loss: LossFunction,
    plan: Plan,
    *,
    size: int,
    local_size: int,
    device: torch.device,
    rates: Rates | None = None,
    calibration: Calibration | None = None,
    held_bytes: int = 0,
) -> Prediction:
    """What a run takes that is about to start: one micro-batch is traced without storage, a fraction of a second.

    Args:
        strategy: of the run.
        spec: of the model, before the strategy has changed it.
        batch: a micro-batch on CPU.
        loss: of the run.
        plan: of a step.
        size: ranks.
        local_size: ranks of a machine.
        device: of this rank.
        rates: how fast everything is; None: as the tables say of the device.
        calibration: factors that were learnt from runs.
        held_bytes: of the model, in this process already.

    Raises:
        ConfigError: the model can't run without storage.
    """
    assert spec.outline is not None
    how = plan.activation_checkpointing
    _part_from_the_model(spec.outline)
    with torch.random.fork_rng(devices=[]):
        traced = trace(
            spec.outline, batch, loss, precision=plan.precision, activation_checkpointing=how, device=device.type
        )
    footprint = strategy.footprint(spec, WorldSpec(size=size, local_size=local_size), plan)
    parts = memory(footprint, traced)
    taken = parts.in_use
    if device.type == "cpu":
        # A process is measured as a whole, and its peak may lie behind it.
        now = psutil.Process().memory_info().rss - held_bytes
        taken = max(now + taken + parts.host, round(peak_memory_mib(device) * MIB))
    rates = rates or _from_tables(device, plan.precision.numbers, size, local_size)
    if calibration is not None:
        rates = calibration.rates(rates, device.type, plan.precision.numbers, size, local_size)
    if rates is None:
        return Prediction(memory_bytes=taken, step_s=None)
    work = Work(
        trace=traced, footprint=footprint, plan=plan, machines=rates.machines, numbers=plan.precision.numbers.name
    )
    found = work.speed(rates.factors)
    if found is None:
        return Prediction(memory_bytes=taken, step_s=None)
    return Prediction(memory_bytes=taken, step_s=found.step_s, work=work, factors=rates.factors)


def _from_tables(device: torch.device, numbers: Numbers, size: int, local_size: int) -> Rates | None:
    """Of a GPU that the tables know, in an instance type that they know if the machine says it."""
    if device.type != "cuda":
        return None
    of: dict[str, Any] = {"instance": instance_type()}
    if of["instance"] not in instances():
        total = torch.cuda.get_device_properties(device).total_memory
        of = {"device": torch.cuda.get_device_name(device), "memory_gib": total / 2**30}
    try:
        machines = Cluster(nodes=-(-size // local_size), devices=local_size, **of).facts(numbers)
    except ConfigError:
        return None
    return Rates.published(machines, numbers)


def _part_from_the_model(outline: nn.Module) -> None:
    """It shares with the model whatever isn't a tensor: hooks that are hung up here, and what its forward keeps, stay
    here."""
    for part in outline.modules():
        for name, value in vars(part).items():
            if isinstance(value, (dict, list, set)):
                part.__dict__[name] = copy.copy(value)


def forget_tensors_without_storage() -> None:
    """After a model has been traced: let go of what its own code may have kept of that, which no run could use."""
    if not _are_there():
        return
    gc.collect()
    if _are_there():  # in the cache of a function, as for masks; it is only filled again
        others = [module for name, module in [*sys.modules.items()] if not name.startswith("torch.")]
        for each in (value for module in others for value in [*getattr(module, "__dict__", {}).values()]):
            if type(each) is functools._lru_cache_wrapper:  # isinstance would ask whatever there is for its class
                each.cache_clear()


def _are_there() -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return any(type(each) is FakeTensor for each in gc.get_objects())
