"""A step's work apart from how fast anything is, and the file that keeps it with a run.

`prediction.json` of a run's folder holds what its time was reckoned from, operator by operator, so that
`shardwright plan --calibrate` can reckon again with other factors, without the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from strategies.base import Collective, Footprint, Plan
from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.kernels import Call, Kind
from trainer.planner.speed import Speed, compute, speed
from trainer.planner.stages import Stage, Trace

FILE = "prediction.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What times are predicted from."""

    machines: Machines
    factors: Efficiency

    @classmethod
    def published(cls, machines: Machines, numbers: Numbers) -> Rates:
        """With the factors of the tables, under the machines' power limit."""
        factors = efficiency_of(machines.device, numbers)
        limit, nominal = machines.power_w, factors.nominal_w
        limited = limit is not None and nominal is not None and limit < nominal
        return cls(machines=machines, factors=factors.at_power(limit) if limited and limit is not None else factors)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step of one rank, apart from how fast anything is."""

    trace: Trace
    footprint: Footprint
    plan: Plan
    machines: Machines
    numbers: str

    def speed(self, factors: Efficiency) -> Speed | None:
        """What it takes; None: a rate isn't known that it hangs on."""
        one = compute(self.trace, self.machines, factors, compiled=self.plan.compile)
        if one is None:
            return None
        return speed(one, self.footprint, self.plan, self.machines, factors, model_flops=self.trace.flops)


def to_json(work: Work, factors: Efficiency) -> dict[str, Any]:
    tables: dict[int, int] = {}
    calls: list[list[list[Any]]] = []

    def number(stage: Stage) -> int:
        """Stages that are alike share their operators."""
        if id(stage.calls) not in tables:
            tables[id(stage.calls)] = len(calls)
            alike = Counter((call.kind.name, call.flops, call.bytes) for call in stage.calls)
            calls.append([[*call, count] for call, count in alike.items()])
        return tables[id(stage.calls)]

    footprint, machines = asdict(work.footprint), asdict(replace(work.machines, sources={}))
    return {
        "format": _FORMAT,
        "numbers": work.numbers,
        "machines": machines,
        "factors": {name: getattr(factors, name) for name in Efficiency.factors()},
        "plan": {
            "micro_batch": work.plan.micro_batch,
            "accumulation": work.plan.accumulation,
            "clip_norm": work.plan.clip_norm,
            "compile": work.plan.compile,
        },
        "footprint": {**footprint, "beside": []},
        "micro_batch": work.trace.micro_batch,
        "num_tokens": work.trace.num_tokens,
        "forward": [number(stage) for stage in work.trace.forward],
        "backward": [number(stage) for stage in work.trace.backward],
        "calls": calls,
    }


def read_work(folder: Path) -> tuple[Work, Efficiency]:
    """What a run's time was reckoned from, and the factors then.

    Raises:
        ConfigError: there is nothing, or nothing that can be read; says why that may be.
    """
    path = folder / FILE
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != _FORMAT:
            raise ValueError(f"its format is {stored['format']}")
        return _from_json(stored)
    except FileNotFoundError:
        raise ConfigError(
            f"plan: {folder} has no {FILE}: it is no run's folder, or the run's time wasn't predicted, as on "
            "processors that nobody measured. Train it with strategy=auto, which measures, or give another run "
            "(--calibrate)."
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"plan: {path} can't be read: {error}. Give another run (--calibrate).") from error


def _from_json(stored: Mapping[str, Any]) -> tuple[Work, Efficiency]:
    tables = [
        tuple(Call(Kind[kind], flops, size) for kind, flops, size, count in table for _ in range(count))
        for table in stored["calls"]
    ]

    def stages(numbers: Sequence[int]) -> tuple[Stage, ...]:
        return tuple(Stage(before=0, peak=0, calls=tables[number], moments=()) for number in numbers)

    footprint = dict(stored["footprint"])
    footprint["collectives"] = tuple(Collective(**each) for each in footprint["collectives"])
    known = {item.name for item in fields(Footprint)}
    work = Work(
        trace=Trace(
            forward=stages(stored["forward"]),
            backward=stages(stored["backward"]),
            micro_batch=stored["micro_batch"],
            num_tokens=stored["num_tokens"],
        ),
        footprint=Footprint(**{key: value for key, value in footprint.items() if key in known} | {"beside": ()}),
        plan=Plan(**stored["plan"]),
        machines=Machines(**stored["machines"]),
        numbers=stored["numbers"],
    )
    factors = efficiency_of(work.machines.device, Numbers[work.numbers])
    changed = {name: value for name, value in stored["factors"].items() if value != getattr(factors, name)}
    return work, factors.with_factors(**changed)
