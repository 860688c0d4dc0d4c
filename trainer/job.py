"""What `build` hands to `Trainer.fit`: every part of a job, made and checked, none of it configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.base import Strategy
from strategies.precision import Precision
from strategies.world import World
from trainer.checkpoint import Checkpoints
from trainer.data.base import AbstractData
from trainer.hooks.base import Hook
from trainer.metrics.base import AbstractLogger
from trainer.models.base import AbstractModel
from trainer.optim import AbstractOptimizer
from trainer.planner.work import Rates
from trainer.profiling.base import AbstractProfiler
from trainer.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job."""

    strategy: Strategy
    world: World
    folder: Path
    """The run's folder, claimed for this run."""
    optimizer: AbstractOptimizer
    schedule: Schedule
    model: AbstractModel | None = None
    """None: the Trainer subclass makes the model itself."""
    data: AbstractData | None = None
    """None: the Trainer subclass makes the data itself."""
    precision: Precision = field(default_factory=Precision)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    loggers: Mapping[str, AbstractLogger] = field(default_factory=dict)
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    profiler: AbstractProfiler | None = None
    seed: int = 0
    resume: str = "auto"
    compile: bool = False
    cache: Path = Path("~/.cache/shardwright")
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration with secrets redacted; kept with each checkpoint."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """The option chosen in each group."""
    rates: Rates | None = None
    """What the run's time is predicted from; None: what the tables know of the device."""
