"""The live display of a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from trainer.metrics.screen import Screen
from trainer.metrics.text import compact, duration, short

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REFRESH_S = 0.2


class LiveScreen(Screen):
    """Redrawn by the training process itself, at most every 0.2 s.

    A thread that draws would be copied, holding its lock, into forked data workers.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._console: Console = Console(file=stream, highlight=False, emoji=False)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn())
        time_columns = (TimeElapsedColumn(), TextColumn("[cyan]{task.fields[left]}"))
        self._progress = Progress(*columns, *time_columns, console=self._console, auto_refresh=False, expand=True)
        self._task: TaskID = self._progress.add_task("step 0", total=None, left="")
        self._parts: dict[str, TaskID] = {}
        self._metrics: dict[str, float] = {}
        self._total: int | None = None
        self._live: Any = None
        self._drawn = 0.0

    def begin(self, total: int | None, step: int) -> None:
        self._total = total
        self._progress.update(self._task, total=total)
        self._advance(step)
        self._refresh()

    def open(self) -> None:
        from rich.live import Live

        if self._live is not None:
            return
        self._progress.reset(self._task, completed=int(self._progress.tasks[0].completed))
        self._live = Live(
            console=self._console, get_renderable=self._picture, auto_refresh=False, vertical_overflow="visible"
        )
        self._live.start(refresh=True)
        # A killed process can't bring a hidden cursor back.
        self._console.show_cursor(True)

    def close(self) -> None:
        if self._live is None:
            return
        live, self._live = self._live, None
        for name in self._parts:
            self._progress.update(self._parts[name], visible=False)
        live.stop()

    def advance(self, step: int) -> None:
        self._advance(step)
        self._draw()

    def logged(self, line: str, step: int, metrics: Mapping[str, float], eta: float | None) -> None:
        self._metrics |= metrics
        self._progress.update(self._task, left="" if eta is None else f"{duration(eta)} left")
        self._advance(step)
        self._draw()

    def part(self, name: str, done: int, total: int) -> None:
        if name not in self._parts:
            self._parts[name] = self._progress.add_task(name, total=total, left="")
        task = self._parts[name]
        begins = not self._progress.tasks[self._progress.task_ids.index(task)].visible or done == 0
        if begins and done < total:
            self._progress.reset(task, total=total, description=name, left="")
        self._progress.update(task, completed=done, total=total, visible=done < total)
        self._draw(now=begins or done >= total)

    def evaluated(self, line: str, metrics: Mapping[str, float]) -> None:
        self._metrics |= metrics
        self.print(line)

    def print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, markup=False, soft_wrap=True, style=style)

    def show(self, renderable: RenderableType, text: str) -> None:
        self._console.print(renderable)

    def _advance(self, step: int) -> None:
        text = f"step {step}" if self._total is None else f"step {step}/{self._total}"
        self._progress.update(self._task, completed=step, description=text)

    def _draw(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._drawn >= _REFRESH_S:
            self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        numbers = Text("  ".join(_readable(self._metrics)), style="dim", overflow="ellipsis", no_wrap=True)
        return Group(self._progress.get_renderable(), numbers) if self._metrics else self._progress.get_renderable()


def _readable(metrics: Mapping[str, float]) -> list[str]:
    """The numbers that matter, most important first, since a narrow terminal cuts the end off."""
    forms: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {short(value)}",
        "val_loss": lambda value: f"val {short(value)}",
        "tokens_per_s": lambda value: f"{compact(value)} tokens/s",
        "samples_per_s": lambda value: f"{compact(value)} samples/s",
        "step_s": lambda value: f"{compact(value * 1000)} ms/step",
        "mfu": lambda value: f"MFU {value:.1%}",
        "memory_mib": lambda value: f"{value:.0f} MiB",
        "grad_norm": lambda value: f"grad {compact(value)}",
        "lr": lambda value: f"lr {value:.3g}",
    }
    return [form(metrics[name]) for name, form in forms.items() if name in metrics]
