"""What a run shows while it goes: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from trainer.metrics.live import LiveScreen
from trainer.metrics.logs import LOGGER
from trainer.metrics.screen import PlainScreen, Screen
from trainer.metrics.text import duration, printable, short

if TYPE_CHECKING:
    from rich.console import RenderableType

_FIRST = ("loss", "grad_norm", "lr", "tokens_per_s", "samples_per_s", "step_s", "mfu", "eta", "memory_mib")
_QUIET = {"tokens", "samples", "epoch", "skipped", "seconds", "loss_scale", "data_s", "compute_s", "communication_s",
          "communication_total_s", "checkpoint_s", "evaluation_s", "hooks_s", "slowest_rank", "straggle"}  # fmt: skip
_ETA_WINDOW = 50
"""Logged steps whose pace the time left is reckoned from."""


class Display:
    """Tells the person at the terminal how the run goes; on other ranks than 0 it only writes the log file.

    Every line and message also goes to the logger `shardwright`, and so to the rank's log file.
    Used as a context, it leaves the terminal as it was, whatever happens inside.
    """

    def __init__(
        self,
        total_steps: int | None,
        rank: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show; `message` works at once, the display comes with `start`.

        Args:
            total_steps: the step at which the run ends; None: not known.
            rank: of this process.
            start_step: steps that were done before this start.
            stream: where to show; None: stdout.
            now: a clock in seconds.
        """
        stream = sys.stdout if stream is None else stream
        live = rank == 0 and is_terminal(stream)
        self._screen: Screen = LiveScreen(stream) if live else PlainScreen(stream if _shows(rank) else None)
        self._now = now
        self._pace: deque[tuple[int, float]] = deque(maxlen=_ETA_WINDOW)
        self.set_total(total_steps, start_step)

    def set_total(self, total_steps: int | None, start_step: int) -> None:
        """What the run turned out to be, once that is known: `message` works before."""
        self._total = total_steps
        self._screen.begin(total_steps, start_step)
        self._restart_pace(start_step)

    def start(self) -> None:
        """Begin to show; from here on, time counts for the time left."""
        self._screen.open()
        self._restart_pace(self._pace[-1][0])

    def advance(self, step: int) -> None:
        """A step was done; cheap enough to be called after each."""
        self._screen.advance(step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was logged."""
        if step < self._pace[-1][0]:
            self._restart_pace(step)  # rolled back
        self._pace.append((step, self._now()))
        eta = self._time_left(step)
        line = step_line(step, self._total, metrics, eta)
        LOGGER.info("%s", line)
        self._screen.logged(line, step, metrics, eta)

    def evaluation(self, done: int, total: int) -> None:
        """`done` of `total` batches of an evaluation."""
        self._screen.part("evaluating", done, total)

    def checkpoint(self, *, done: bool) -> None:
        """A checkpoint is being written, or is done."""
        self._screen.part("writing checkpoint", int(done), 1)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done; shows its metrics."""
        line = " ".join([f"step={step}", *(f"{name}={short(value)}" for name, value in metrics.items())])
        LOGGER.info("%s", line)
        self._screen.part("evaluating", 1, 1)
        self._screen.evaluated(line, metrics)

    def message(self, text: str) -> None:
        """One line, or several; above the live display."""
        text = printable(text)
        LOGGER.info("%s", text)
        self._screen.print(text)

    def warning(self, text: str) -> None:
        """A line that nobody must miss."""
        text = printable(text)
        LOGGER.warning("%s", text)
        self._screen.print(f"WARNING: {text}", style="bold yellow")

    def show(self, renderable: RenderableType) -> None:
        """A table or another thing of `rich`; as plain text where there is no terminal."""
        text = render(renderable)
        LOGGER.info("\n%s", text)
        self._screen.show(renderable, text)

    def close(self) -> None:
        """Leave the last state on the screen, and the terminal as it was; may be called twice."""
        self._screen.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restart_pace(self, step: int) -> None:
        self._pace.clear()
        self._pace.append((step, self._now()))

    def _time_left(self, step: int) -> float | None:
        (first, began), (last, now) = self._pace[0], self._pace[-1]
        if self._total is None or last <= first:
            return None
        return max(0, self._total - step) * (now - began) / (last - first)


def _shows(rank: int) -> bool:
    """Rank 0 does, and where each machine's log is looked at by somebody, the first rank of each."""
    return rank == 0 or (os.environ.get("SHARDWRIGHT_SHOW") == "each_machine" and os.environ.get("LOCAL_RANK") == "0")


def step_line(step: int, total: int | None, metrics: Mapping[str, float], eta: float | None) -> str:
    """`step=100/2000 loss=1.2345 ...`: the same keys in the same order each time, for programs that read along."""
    parts = [f"step={step}" if total is None else f"step={step}/{total}"]
    others = [name for name in metrics if name not in _FIRST and name not in _QUIET]
    for name in (*_FIRST, *others):
        if name == "eta" and eta is not None:
            parts.append(f"eta={duration(eta)}")
        elif name in metrics:
            parts.append(f"{name}={_number(name, metrics[name])}")
    return " ".join(parts)


def _number(name: str, value: float) -> str:
    if name in ("tokens_per_s", "memory_mib"):
        return f"{value:.0f}"
    if name in ("lr", "samples_per_s", "step_s", "mfu"):
        return f"{value:.4g}"
    return short(value)


def render(renderable: RenderableType, width: int = 100) -> str:
    """A thing of `rich` as plain text, without colour."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at it who can see more than lines."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
