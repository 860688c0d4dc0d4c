"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from strategies.timing import phase
from trainer.pulse import PULSE

COMPUTE = "compute"
KINDS = (COMPUTE, "data", "checkpoint", "evaluation", "hooks")
_IN_A_STEP = (COMPUTE, "data")


@dataclass(slots=True)
class _Communication:
    """Of some steps: seconds where they are known, and how many steps they aren't known of."""

    exposed_s: float = 0.0
    whole_s: float = 0.0
    unknown: int = 0
    unknown_whole: int = 0

    def step(self, exposed_s: float | None, whole_s: float | None) -> None:
        if exposed_s is None:
            self.unknown += 1
        else:
            self.exposed_s += exposed_s
        if whole_s is None:
            self.unknown_whole += 1
        else:
            self.whole_s += whole_s

    def plus(self, other: _Communication) -> _Communication:
        return _Communication(
            self.exposed_s + other.exposed_s,
            self.whole_s + other.whole_s,
            self.unknown + other.unknown,
            self.unknown_whole + other.unknown_whole,
        )

    def exposed(self, sampled: tuple[float, float] | None) -> float | None:
        if self.unknown and sampled is None:
            return None
        return self.exposed_s + (self.unknown * sampled[0] if sampled is not None else 0.0)

    def whole(self, sampled: tuple[float, float] | None) -> float | None:
        if self.unknown_whole and sampled is None:
            return None
        return self.whole_s + (self.unknown_whole * sampled[1] if sampled is not None else 0.0)


class StepClock:
    """Splits a run's wall-clock time into kinds; every moment belongs to exactly one of them.

    Whatever isn't measured as `data`, `checkpoint`, `evaluation` or `hooks` is compute: on an
    accelerator the host only queues work, and the wait for it shows up wherever a number is read.
    Communication that no compute hides is taken out of compute, where the strategy knows it. An accelerator's is known
    of single steps alone, which are watched more closely (`sampled`); the others are taken to be like the last of them.

    A step's time is its compute, communication and data. Evaluation, checkpoints and hooks are how
    often somebody wants to look, not speed, so they don't count in `step_s` and `tokens_per_s`; how
    much they cost is in `checkpoint_s` and in the totals.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._kind = COMPUTE
        self._since = self._lapped = now()
        self._window = dict.fromkeys(KINDS, 0.0)
        self._before = dict.fromkeys(KINDS, 0.0)
        self._communication_before = _Communication()
        self.sampled: tuple[float, float] | None = None
        """Seconds of communication of the step that was watched last: exposed, and in all."""
        self._begin_window()
        self._measures = {kind: _Measure(self, kind) for kind in KINDS}

    def _begin_window(self) -> None:
        self._window = dict.fromkeys(KINDS, 0.0)
        self._communication = _Communication()
        self._steps = 0
        self._tokens = 0
        self._waited_before = PULSE.waited_s

    def measure(self, kind: str) -> _Measure:
        """A context whose time counts as `kind`, one of `KINDS`; an inner one takes its time from the outer."""
        return self._measures[kind]

    def step_done(
        self, communication_s: float | None = None, communication_total_s: float | None = None, *, tokens: int = 0
    ) -> None:
        """Count an optimizer step.

        Args:
            communication_s: seconds of it that waited for other ranks and hid behind no compute; None: not known.
            communication_total_s: those that hid behind compute too; None: not known.
            tokens: real tokens of it, of all ranks together.
        """
        self._steps += 1
        self._tokens += tokens
        self._communication.step(communication_s, communication_total_s)

    def window(self) -> dict[str, float]:
        """Means over the steps since the last call, up to now.

        Returns:
            `step_s`, `tokens_per_s` (real tokens of all ranks), and of each step `data_s`, `compute_s`,
            `communication_s` (absent where not known) and `checkpoint_s`. The first three parts add up
            to `step_s`. `communication_total_s` has what hid behind compute as well. Empty if no step was done.
        """
        if self._steps == 0:
            return {}
        self._switch(self._kind)
        spent, communication = self._window, self._exposed(self._window, self._communication)
        whole = self._communication.whole(self.sampled)
        in_steps = sum(spent[kind] for kind in _IN_A_STEP)
        found = {
            "step_s": in_steps / self._steps,
            "tokens_per_s": self._tokens / in_steps if in_steps > 0 else 0.0,
            "data_s": spent["data"] / self._steps,
            "compute_s": (spent[COMPUTE] - (communication or 0.0)) / self._steps,
        }
        if communication is not None:
            found["communication_s"] = communication / self._steps
        if whole is not None:
            found["communication_total_s"] = whole / self._steps
        found["checkpoint_s"] = spent["checkpoint"] / self._steps
        self._close_window()
        return found

    def own_s(self) -> tuple[float, float]:
        """Of this rank itself, per step since the last window: seconds that weren't spent waiting for others.

        Returns:
            All of them, and those of them that went into data. Zeros if no step was done.
        """
        if self._steps == 0:
            return 0.0, 0.0
        self._switch(self._kind)
        data = self._window["data"] - (PULSE.waited_s - self._waited_before)
        compute = self._window[COMPUTE] - (self._exposed(self._window, self._communication) or 0.0)
        return (compute + data) / self._steps, data / self._steps

    def totals(self) -> dict[str, float]:
        """Seconds of this start by kind, as `data_s`, `compute_s`, ...; they add up to its wall-clock time.

        `communication_s` is absent where it isn't known; it is then part of `compute_s`.
        """
        self._switch(self._kind)
        spent = {kind: self._before[kind] + self._window[kind] for kind in KINDS}
        communication = self._exposed(spent, self._communication_before.plus(self._communication))
        found = {f"{kind}_s": seconds for kind, seconds in spent.items()}
        if communication is not None:
            found["compute_s"] -= communication
            found["communication_s"] = communication
        return found

    def communication_total_s(self) -> float | None:
        """Seconds of communication of this start, with those that hid behind compute; None: not known."""
        return self._communication_before.plus(self._communication).whole(self.sampled)

    def lap(self) -> float:
        """Wall-clock seconds since the last call, or since the beginning."""
        now = self._now()
        passed, self._lapped = now - self._lapped, now
        return passed

    def _exposed(self, spent: dict[str, float], communication: _Communication) -> float | None:
        # Timed on the device, so it can run ahead of what the host has spent.
        exposed = communication.exposed(self.sampled)
        return None if exposed is None else min(exposed, spent[COMPUTE])

    def _close_window(self) -> None:
        for kind in KINDS:
            self._before[kind] += self._window[kind]
        self._communication_before = self._communication_before.plus(self._communication)
        self._begin_window()

    def _switch(self, kind: str) -> str:
        now = self._now()
        before = self._kind
        PULSE.enter(kind)
        self._window[before] += now - self._since
        self._kind, self._since = kind, now
        return before


class _Measure:
    """A class and not a generator: entering and leaving takes well under a microsecond."""

    __slots__ = ("_clock", "_kind", "_outer", "_phases")

    def __init__(self, clock: StepClock, kind: str) -> None:
        self._clock = clock
        self._kind = kind
        self._outer: list[str] = []
        self._phases: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        self._phases.append(phase(self._kind))
        self._phases[-1].__enter__()
        self._outer.append(self._clock._switch(self._kind))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._switch(self._outer.pop())
        self._phases.pop().__exit__(None, None, None)
