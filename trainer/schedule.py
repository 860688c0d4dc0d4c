"""Learning-rate schedules: pure functions of the optimizer step, so that a resume needs no state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from strategies.errors import ConfigError


@dataclass(kw_only=True)
class Schedule(ABC):
    """What multiplies `optimizer.lr` at each step: a linear rise over `warmup` steps, then a shape."""

    warmup: int | float = 0
    """Optimizer steps over which the rate rises linearly; the first one isn't 0, the last one is full.
    Below 1, the share of all steps."""

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 or (self.warmup > 1 and float(self.warmup).is_integer())):
            raise ConfigError(
                f"{type(self).__name__}: warmup={self.warmup} is neither a number of steps nor a share below 1. "
                "Try 100, or 0.03 (schedule.warmup)."
            )
        self._check()

    @final
    def factor(self, step: int, total: int | None) -> float:
        """The factor for one step.

        Args:
            step: optimizer steps done before this one, >= 0.
            total: steps of the whole run; None: not known, as when only a time limit ends it.

        Returns:
            From 0 to 1. At `step >= total` (a run that was prolonged by a hook) the final value.

        Raises:
            ConfigError: the shape needs `total` and there is none, or the warmup is longer than the run.
        """
        if total is None and (self._needs_total or 0 < self.warmup < 1):
            raise ConfigError(
                f"{type(self).__name__}: the schedule needs to know how long the run is, and only a time limit "
                "ends it. Set trainer.max_steps, or use schedule=constant with a warmup in steps (trainer.max_steps)."
            )
        if total is not None and self.warmup > total:
            raise ConfigError(
                f"{type(self).__name__}: warmup={self.warmup} is longer than the run of {total} steps. "
                f"Choose {total} at most (schedule.warmup)."
            )
        self._check_length(total)
        warmup = self._warmup_steps(total)
        return (step + 1) / warmup if step < warmup else self._shape(step, total)

    @final
    def _warmup_steps(self, total: int | None) -> int:
        return round(self.warmup * (total or 0)) if self.warmup < 1 else int(self.warmup)

    def _check(self) -> None:
        """Refuse fields out of range."""

    def _check_length(self, total: int | None) -> None:
        """Refuse a shape that a run of `total` steps is too short for."""

    @property
    @abstractmethod
    def _needs_total(self) -> bool:
        """Whether the shape depends on the run's length."""

    @abstractmethod
    def _shape(self, step: int, total: int | None) -> float:
        """The factor after the warmup."""

    def _done(self, step: int, total: int | None) -> float:
        """The share of the way from the end of the warmup to the last step, in [0, 1]."""
        assert total is not None, "factor() refuses this"
        warmup = self._warmup_steps(total)
        steps = total - 1 - warmup
        return 1.0 if steps <= 0 else min(1.0, (step - warmup) / steps)


def _check_share(where: Schedule, key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{type(where).__name__}: {key}={value} is not between 0 and 1. Try 0.1 (schedule.{key}).")


@final
@dataclass(kw_only=True)
class ConstantSchedule(Schedule):
    """The same rate to the end."""

    @property
    def _needs_total(self) -> bool:
        return False

    def _shape(self, step: int, total: int | None) -> float:
        return 1.0


@dataclass(kw_only=True)
class AbstractFall(Schedule):
    """One fall from the end of the warmup to the last step."""

    final_ratio: float = 0.0
    """The factor of the last step."""

    @final
    def _check(self) -> None:
        _check_share(self, "final_ratio", self.final_ratio)

    @property
    def _needs_total(self) -> bool:
        return True

    @final
    def _shape(self, step: int, total: int | None) -> float:
        return self.final_ratio + (1.0 - self.final_ratio) * self._left(self._done(step, total))

    @abstractmethod
    def _left(self, done: float) -> float:
        """What is left of the fall, from 1 to 0, when the share `done` of the way is."""


@final
@dataclass(kw_only=True)
class LinearSchedule(AbstractFall):
    """A straight line from 1 to `final_ratio`. Source: Devlin et al. 2019, appendix A.2."""

    def _left(self, done: float) -> float:
        return 1.0 - done


@final
@dataclass(kw_only=True)
class CosineSchedule(AbstractFall):
    """Half a cosine from 1 to `final_ratio`, once. Source: Loshchilov and Hutter 2017, equation 5, without restarts."""

    final_ratio: float = 0.1
    """The factor of the last step."""

    def _left(self, done: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * done))


@final
@dataclass(kw_only=True)
class WSDSchedule(Schedule):
    """Warmup, a stable stretch, and a decay at the end that is linear in the step.

    Source: Hu et al. 2024 (MiniCPM), section 4; linear decay as in Hägele et al. 2024, section 3.
    """

    decay: float = 0.2
    """The share of the whole run that the decay takes."""
    final_ratio: float = 0.0
    """The factor of the last step."""

    def _check(self) -> None:
        _check_share(self, "decay", self.decay)
        _check_share(self, "final_ratio", self.final_ratio)

    def _check_length(self, total: int | None) -> None:
        assert total is not None, "factor() refuses this"
        warmup, decay = self._warmup_steps(total), round(self.decay * total)
        if warmup + decay > total:
            raise ConfigError(
                f"WSDSchedule: a warmup of {warmup} steps and a decay of {decay} are longer than the run of {total}. "
                f"Choose a decay of {1 - warmup / total:.2g} at most (schedule.warmup, schedule.decay)."
            )

    @property
    def _needs_total(self) -> bool:
        return True

    def _shape(self, step: int, total: int | None) -> float:
        assert total is not None, "factor() refuses this"
        steps = round(self.decay * total)
        begin = max(total - steps, self._warmup_steps(total))
        if step < begin:
            return 1.0
        left = max(total - 1 - step, 0)
        return self.final_ratio + (1.0 - self.final_ratio) * left / max(total - begin, 1)


@final
@dataclass(kw_only=True)
class InverseSqrtSchedule(Schedule):
    """Falls with the square root of the step after the warmup; needs no end.

    Source: Vaswani et al. 2017, section 5.3, scaled so that the warmup ends at 1.
    """

    warmup: int | float = 1000
    """Optimizer steps over which the rate rises linearly, and the time scale of its fall afterwards."""

    def _check(self) -> None:
        if self.warmup < 1:
            raise ConfigError(
                f"InverseSqrtSchedule: warmup={self.warmup} is below 1, and the fall is counted from its end. "
                "Try 1000 (schedule.warmup)."
            )

    @property
    def _needs_total(self) -> bool:
        return False

    def _shape(self, step: int, total: int | None) -> float:
        return math.sqrt(self.warmup / (step + 1))


SCHEMAS: tuple[type, ...] = (
    ConstantSchedule,
    LinearSchedule,
    CosineSchedule,
    WSDSchedule,
    InverseSqrtSchedule,
)
