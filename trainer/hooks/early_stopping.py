"""Ends a run whose validation no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from strategies.errors import ConfigError
from trainer.hooks.base import Hook, Moment


class Mode(Enum):
    """Whether the least value of a metric is the best, or the greatest."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class EarlyStopping(Hook):
    """Stops after `patience` evaluations in a row without a new best; counts on over a restart."""

    metric: str = "val_loss"
    """Name of a number that an evaluation gives."""
    patience: int = 3
    """Evaluations."""
    min_delta: float = 0.0
    """By how much a value must be better than the best one to count as new best."""
    mode: Mode = Mode.min

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(
                f"EarlyStopping: patience={self.patience} is below 1. Give a number of evaluations "
                "(hooks.early_stopping.patience)."
            )
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(
                f"EarlyStopping: min_delta={self.min_delta} is not a number from 0 on. Give 0 or more "
                "(hooks.early_stopping.min_delta)."
            )
        self._best: float | None = None
        self._best_step = 0
        self._without = 0

    def on_evaluate(self, moment: Moment) -> str | None:
        value = moment.metrics.get(self.metric)
        if value is None:
            raise ConfigError(
                f"EarlyStopping: no evaluation gives {self.metric!r}; there are "
                f"{', '.join(sorted(moment.metrics))}. Name one of them (hooks.early_stopping.metric)."
            )
        if self._is_best(value):
            self._best, self._best_step, self._without = value, moment.progress.step, 0
            return None
        self._without += 1
        if self._without < self.patience:
            return None
        best = "never a number" if self._best is None else f"best {self._best:.4f} at step {self._best_step}"
        return f"{self.metric} did not improve in {self._without} evaluations ({best})"

    def _is_best(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self.mode is Mode.min else value - self._best
        return gain > self.min_delta

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "without": self._without}

    def load_state(self, state: dict[str, Any]) -> None:
        self._best = state.get("best")
        self._best_step = int(state.get("best_step", 0))
        self._without = int(state.get("without", 0))
