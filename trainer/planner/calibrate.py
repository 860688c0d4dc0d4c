"""Factors learnt from runs: how fast one device really was, in one precision, where others were predicted."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.metrics.throughput import peak_flops_of
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.speed import Speed, crosses
from trainer.planner.work import Rates, Work, read_work

FILE = "plan-calibration.json"
_FORMAT = 1
_COMPUTE = ("matmul", "attention_forward", "attention_backward", "memory")
_WITHIN = (("intra_collective", "intra_all_reduce"), ("intra_latency_s",))
_BETWEEN = (("inter_collective",), ("inter_latency_s", "inter_step_s"))
"""Factors that are rates, and those that are times."""
_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Of one device in one number format."""

    device: str
    numbers: str
    factors: Mapping[str, float]
    """In place of the published ones."""
    machines: Mapping[str, Any] = field(default_factory=dict)
    """Of a device that no table knows: what was measured of it, as `Machines` has it."""
    runs: Sequence[str] = ()
    error_percent: Mapping[str, float] = field(default_factory=dict)
    """Of a step's time, as the mean over the runs without sign: `before` and `after`."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A file of them."""

    entries: Sequence[Entry]
    path: Path

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """From a file that `shardwright plan --calibrate` wrote.

        Raises:
            ConfigError: it can't be read, or holds something else.
        """
        try:
            stored = json.loads(path.read_text())
            if stored["format"] != _FORMAT:
                raise ValueError(f"its format is {stored['format']}")
            return cls(entries=tuple(_checked(Entry(**each)) for each in stored["entries"]), path=path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"plan: {path} is no calibration that can be read: {error}. Write one with shardwright plan "
                "--calibrate RUN (--calibration, trainer.calibration)."
            ) from error

    def write(self) -> None:
        """Raises ConfigError: the file can't be written."""
        try:
            self.path.write_text(
                json.dumps({"format": _FORMAT, "entries": [asdict(each) for each in self.entries]}, indent=1) + "\n"
            )
        except OSError as error:
            raise ConfigError(
                f"plan: {self.path} can't be written: {error}. Choose another folder (run.dir)."
            ) from error

    def of(self, device: str, numbers: Numbers) -> Entry | None:
        """What was learnt of it, if anything was."""
        found = (each for each in self.entries if (each.device, each.numbers) == (device, numbers.name))
        return next(found, None)

    def applied(self, factors: Efficiency, numbers: Numbers) -> Efficiency:
        """The factors of a device with what was learnt of it.

        Raises:
            ConfigError: nothing was.
        """
        entry = self.of(factors.device, numbers)
        if entry is None:
            known = ", ".join(f"{each.device} in {each.numbers}" for each in self.entries)
            raise ConfigError(
                f"plan: {self.path} has nothing on {factors.device} in {numbers.name}, only on {known}. Calibrate with "
                "a run of that, or leave it out (--calibration, trainer.calibration)."
            )
        return factors.with_factors(**entry.factors)

    def rates(self, rates: Rates | None, device: str, numbers: Numbers, size: int, local_size: int) -> Rates | None:
        """What a run's time is predicted from.

        Args:
            rates: as they would be without this.
            device: whose machines are taken where `rates` are None.
            numbers: of the run.
            size: ranks of the run.
            local_size: ranks of one of its machines.

        Raises:
            ConfigError: nothing was learnt of this device.
        """
        if rates is not None:
            return Rates(machines=rates.machines, factors=self.applied(rates.factors, numbers))
        factors = self.applied(efficiency_of(device, numbers), numbers)
        entry = self.of(device, numbers)
        if entry is None or not entry.machines:
            return None
        machines = Machines(**{**entry.machines, "nodes": -(-size // local_size), "devices": local_size})
        return Rates(machines=machines, factors=factors)


def _checked(entry: Entry) -> Entry:
    factors = efficiency_of(entry.device, Numbers[entry.numbers]).with_factors(**entry.factors)
    if entry.machines:
        Machines(**entry.machines)
    assert factors.device == entry.device
    return entry


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: what its step was reckoned from, and what it took."""

    folder: Path
    work: Work
    measured: Mapping[str, float]
    """Seconds of a step by kind, as in its summary."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """From a run's folder.

        Raises:
            ConfigError: nothing can be learnt from it; says why.
        """
        work, _ = read_work(folder)
        try:
            measured = json.loads((folder / "summary.json").read_text())["measured"]
            step_s, known = measured.get("step_s"), {key: float(value) for key, value in measured.items()}
        except FileNotFoundError:
            raise ConfigError(
                f"plan: {folder} has no summary.json, so the run hasn't ended. Let it end, or give another "
                "(--calibrate)."
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"plan: {folder}'s summary.json has no measured times ({error!r}). Give another run (--calibrate)."
            ) from error
        if step_s is None or not step_s > 0:
            raise ConfigError(
                f"plan: {folder} was too short: no step was measured after the first ones. Train for more steps, or "
                "log more often (trainer.max_steps, trainer.log_every)."
            )
        return cls(folder=folder, work=work, measured=known)

    def error(self, factors: Efficiency) -> float:
        """Of the predicted step, in per cent of the measured one."""
        return 100 * (self.predicted(factors).step_s / self.measured["step_s"] - 1)

    def predicted(self, factors: Efficiency) -> Speed:
        """With these factors."""
        found = self.work.speed(factors)
        assert found is not None, "it was predicted, or nothing would have been stored"
        return found


def learn(folders: Iterable[Path], path: Path) -> tuple[Calibration, list[str]]:
    """Factors from runs, one set for each device and precision among them.

    Two things are scaled: everything that a device computes, by one number, and everything that travels within a
    machine or between machines, by another where the runs had measured it. More can't be told apart by a step's times.

    Args:
        folders: of runs that have ended.
        path: where the result belongs.

    Returns:
        The result, and lines for people: the error before and after.

    Raises:
        ConfigError: nothing can be learnt from one of them.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for folder in folders:
        run = Run.read(folder)
        groups.setdefault((run.work.machines.device, run.work.numbers), []).append(run)
    entries, lines = list[Entry](), list[str]()
    for (device, name), runs in groups.items():
        numbers = Numbers[name]
        before = efficiency_of(device, numbers)
        after = _fitted(runs, before)
        changed = {each: getattr(after, each) for each in Efficiency.factors()}
        changed = {each: value for each, value in changed.items() if value != getattr(before, each)}
        errors = {
            word: statistics.fmean(abs(run.error(factors)) for run in runs)
            for word, factors in (("before", before), ("after", after))
        }
        entries.append(
            Entry(
                device=device,
                numbers=name,
                factors=changed,
                machines={} if peak_flops_of(device, numbers) is not None else _machines(runs),
                runs=[str(run.folder) for run in runs],
                error_percent=errors,
            )
        )
        told = ", ".join(f"{each}={value:.3g}" for each, value in changed.items())
        lines.append(f"{device} in {name}, from {len(runs)} run{'s' * (len(runs) > 1)}: {told}")
        lines += [
            f"  {run.folder}: a step took {run.measured['step_s']:.4g} s; predicted {run.error(before):+.0f} % before, "
            f"{run.error(after):+.0f} % after"
            for run in runs
        ]
        lines.append(f"  mean error of a step's time: {errors['before']:.0f} % before, {errors['after']:.0f} % after")
    return Calibration(entries=entries, path=path), lines


def _machines(runs: Sequence[Run]) -> dict[str, Any]:
    """Of the newest run, whose rates stand for the others' too."""
    return {**asdict(runs[-1].work.machines), "sources": {}}


def _fitted(runs: Sequence[Run], factors: Efficiency) -> Efficiency:
    for _ in range(_TURNS):  # what hides behind what changes a little
        factors = _scaled(factors, [_COMPUTE, ("launch_s",)], _mean(_computing(run, factors) for run in runs))
        for names, between in ((_WITHIN, False), (_BETWEEN, True)):
            factors = _scaled(factors, names, _mean(_travelling(run, factors, between) for run in runs))
    return factors


def _computing(run: Run, factors: Efficiency) -> float | None:
    """By how much too long the computing was predicted."""
    found = run.predicted(factors)
    if "compute_s" in run.measured and ("communication_s" in run.measured or not run.work.footprint.collectives):
        return (found.compute_s + found.optimizer_s) / run.measured["compute_s"]
    return found.step_s / run.measured["step_s"]


def _travelling(run: Run, factors: Efficiency, between: bool) -> float | None:
    """The same of collectives; None: not known, or this run has others too."""
    machines, collectives = run.work.machines, run.work.footprint.collectives
    measured = run.measured.get("communication_total_s")
    if not collectives or not measured or any(crosses(each, machines) is not between for each in collectives):
        return None
    return run.predicted(factors).communication_s / measured


def _mean(ratios: Iterable[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None and 0 < ratio < math.inf]
    return statistics.geometric_mean(known) if known else None


def _scaled(factors: Efficiency, names: Sequence[Sequence[str]], faster: float | None) -> Efficiency:
    """Rates are multiplied by `faster`, and times divided; None: nothing is."""
    if faster is None:
        return factors
    rates, times = names
    changed = {name: getattr(factors, name) * faster for name in rates}
    return factors.with_factors(**changed, **{name: getattr(factors, name) / faster for name in times})
