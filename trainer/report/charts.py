"""The curves of the page: one figure per number, each run a curve, with marks for what happened on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.metrics.events import Happening
from trainer.metrics.plots import KINDS, Points, as_stairs, extremes, percentile, series, smoothed, thinned, time_parts
from trainer.report.runs import Run
from trainer.report.svg import NUM_RUN_COLOURS, colour, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (6.2, 2.9)
_MOST_LINES = 24
"""Marks beyond which they are short, so that the curves stay visible."""
_MOST_OTHERS = 12
_LINES: Mapping[str, tuple[str, Any]] = {
    "resume": ("muted", (0, (4, 3))),
    "kill": ("kill", "solid"),
    "failure": ("kill", (0, (1, 1))),
    "spread": ("change", (0, (6, 2, 1, 2))),
    "warning": ("warning", (0, (2, 1))),
    "rollback": ("rollback", (0, (1, 2))),
}
_KNOWN = {"step", "loss", "val_loss", "tokens", "samples", "epoch", "skipped", "grad_norm", "lr", "tokens_per_s",
          "samples_per_s", "memory_mib", "step_s", "mfu", "slowest_rank", *KINDS}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A figure, and what reading its values off needs."""

    title: str
    svg: str
    keys: Sequence[tuple[str, str]]
    """What its colours mean: name of the colour, and words."""
    data: Mapping[str, Any]
    """`left`, `right`, `top`, `bottom`: the axes, as parts of the figure; `from`, `to`: the steps there; `unit` of x;
    `series`: name, run, x and y; `marks`: run, x and text."""
    run: int | None = None
    """The only run that it shows; None: it shows all."""


@dataclass
class _Curve:
    name: str
    run: int
    points: Points


class _Canvas:
    """Axes of one chart, and what was drawn there."""

    def __init__(self, runs: Mapping[int, Run], x: str = "step") -> None:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

        self.runs = runs
        self.x = x
        self.figure: Figure = Figure(figsize=_SIZE, layout="constrained")
        self.axes: Axes = self.figure.subplots()
        self.axes.set_xlabel("optimizer step" if x == "step" else x)
        self.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        whole = FuncFormatter(lambda value, _: f"{value:,.0f}")
        self.axes.xaxis.set_major_formatter(whole if x == "step" else EngFormatter(sep=""))
        self.axes.yaxis.set_major_locator(MaxNLocator(5))
        self.curves: list[_Curve] = []

    def plot(self, name: str, run: int, points: Points, **how: Any) -> None:
        """Draw a curve whose values can be read off."""
        self.axes.plot(*points, gid=f"run-{run}", **{"linewidth": 1.5, "color": run_colour(run), **how})
        self.read_off(name, run, points)

    def faint(self, run: int, points: Points) -> None:
        """Draw a curve with all its peaks behind the others."""
        self.axes.plot(*extremes(points), gid=f"run-{run}", color=run_colour(run), alpha=0.25, linewidth=0.8)

    def read_off(self, name: str, run: int, points: Points) -> None:
        """Let values be read off that were drawn another way."""
        self.curves.append(_Curve(name, run, points))

    def finish(self, title: str, keys: Sequence[tuple[str, str]] = (), run: int | None = None) -> Chart:
        """Add the marks, and turn it into a chart."""
        xs = [x for curve in self.curves for x in curve.points[0]]
        low, high = min(xs), max(xs)
        margin = 0.02 * (high - low) or 1.0
        self.axes.set_xlim(low - margin, high + margin)
        marks = [each for index, run in self.runs.items() for each in self._placed(index, run)]
        marks = [each for each in marks if low - margin <= each[1] <= high + margin]
        self._draw_marks(marks)
        svg = to_svg(self.figure, title)  # the layout is made here
        box = self.axes.get_position()
        (begin, end), several = self.axes.get_xlim(), len(self.runs) > 1
        data = {
            "left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0, "from": begin, "to": end,
            "unit": self.x,
            "series": [
                {"name": f"{self.runs[curve.run].name} {curve.name}" if several else curve.name, "run": curve.run,
                 "x": _rounded(curve.points[0], 12), "y": _rounded(curve.points[1], 6)}
                for curve in self.curves
            ],
            "marks": [
                {"run": index, "x": x, "text": f"{self.runs[index].name}: {mark.text}" if several else mark.text}
                for index, x, mark in marks
            ],
        }  # fmt: skip
        return Chart(title, svg, keys, data, run)

    def _placed(self, index: int, run: Run) -> Iterator[tuple[int, float, Happening]]:
        spread = {each.step for each in run.history if each.kind == "spread"}
        found = [
            (each.step, each)
            for each in run.history
            if each.step is not None and each.kind in _LINES and not (each.kind == "resume" and each.step in spread)
        ]
        places = _along(run, [step for step, _ in found], self.x)
        yield from ((index, x, each) for x, (_, each) in zip(places, found, strict=True))

    def _draw_marks(self, marks: Sequence[tuple[int, float, Happening]]) -> None:
        several, crowded = len(self.runs) > 1, len(marks) > _MOST_LINES
        begins = 0.86 if several or crowded else 0.0
        across = self.axes.get_xaxis_transform()
        places: dict[tuple[int, str], list[float]] = {}
        for index, x, mark in marks:
            places.setdefault((index, mark.kind), []).append(x)
        for (index, kind), xs in places.items():
            name, dashes = _LINES[kind]
            self.axes.vlines(
                xs, begins, 1, transform=across, colors=run_colour(index) if several else colour(name),
                linestyles=[dashes], linewidth=1, gid=f"run-{index}", zorder=1.5,
            )  # fmt: skip
            if kind in ("kill", "failure") and not crowded:
                self.axes.plot(
                    xs, [1.0] * len(xs), linestyle="none", marker="x", markersize=4, color=colour("kill"),
                    transform=across, clip_on=False, gid=f"run-{index}",
                )  # fmt: skip
        if not several and not crowded:
            self._label([(x, mark.text) for _, x, mark in marks if mark.kind == "spread"])
        for index, run in self.runs.items():
            self._ticks(index, run)

    def _label(self, labels: Sequence[tuple[float, str]]) -> None:
        """Words above the axes, in up to two rows; what has no room there is found by pointing."""
        low, high = self.axes.get_xlim()
        free = [low, low]
        for x, text in labels:
            width = 0.0135 * len(text) * (high - low)
            begin = min(max(x - width / 2, low), high - width)
            row = next((row for row, end in enumerate(free) if begin >= end), None)
            if row is not None:
                free[row] = begin + width
                self.axes.text(
                    begin, 1.03 + 0.085 * row, text, transform=self.axes.get_xaxis_transform(), fontsize=7.5,
                    color=colour("change"), parse_math=False,
                )  # fmt: skip

    def _ticks(self, index: int, run: Run) -> None:
        own = run_colour(index) if len(self.runs) > 1 else colour("ink")
        saved = [event["step"] for event in run.events if event["event"] == "checkpoint" and "step" in event]
        low, high = self.axes.get_xlim()
        for steps, marker, ink, height in ((saved, "^", own, 0.0), (run.not_finite(), "x", colour("kill"), 0.04)):
            places = _along(run, [step for step in steps if isinstance(step, int)], self.x)
            seen = {round((x - low) / (high - low) * 500): x for x in places if low <= x <= high}  # as fine as one sees
            if seen:
                self.axes.plot(
                    list(seen.values()), [height] * len(seen), linestyle="none", marker=marker, markersize=3.5,
                    color=ink, markeredgewidth=0.8, transform=self.axes.get_xaxis_transform(), clip_on=False,
                    gid=f"run-{index}", zorder=3,
                )  # fmt: skip


def draw_charts(runs: Sequence[Run]) -> list[Chart]:
    """Everything that can be drawn of what the runs logged."""
    with style():
        return [chart for chart in _charts(dict(enumerate(runs))) if chart is not None]


def run_colour(run: int) -> str:
    """The colour of the run with this index."""
    return colour(f"run-{run % NUM_RUN_COLOURS}")


def _charts(runs: Mapping[int, Run]) -> Iterator[Chart | None]:
    yield _loss(runs, "step")
    yield _loss(runs, "tokens")
    yield _curve(runs, "grad_norm", "Gradient norm", smooth=True)
    yield _curve(runs, "lr", "Learning rate", write=lambda value: f"{value:.3g}")
    yield _curve(runs, "tokens_per_s", "Tokens per second", smooth=True, write=_engineering)
    yield _curve(runs, "samples_per_s", "Samples per second", smooth=True, write=_engineering)
    yield _curve(runs, "mfu", "Model FLOPs utilisation", smooth=True, write=lambda value: f"{value:.1%}")
    for index, run in runs.items():
        yield _step_time(index, run, several=len(runs) > 1)
    yield _curve(runs, "memory_mib", "Peak memory of rank 0 (MiB)", write=lambda value: f"{value:,.0f}")
    others = dict.fromkeys(name for run in runs.values() for line in run.lines for name in line if name not in _KNOWN)
    for name in list(others)[:_MOST_OTHERS]:
        yield _curve(runs, name, name)


def _loss(runs: Mapping[int, Run], x: str) -> Chart | None:
    canvas, several = _Canvas(runs, x), len(runs) > 1
    shown: list[float] = []
    for index, run in runs.items():
        if x == "tokens" and not any(line.get("tokens") for line in run.lines):
            continue
        (steps, losses), (evaluated, held_out) = series(run.lines, "loss"), series(run.lines, "val_loss")
        if losses:
            xs, smooth = _along(run, steps, x), smoothed(losses)
            shown += smooth
            canvas.faint(index, (xs, losses))
            canvas.read_off("train", index, thinned((xs, losses)))
            canvas.plot("train, smoothed", index, thinned((xs, smooth)))
        if held_out:
            shown += held_out
            line = {"linestyle": (0, (3, 1.5))} if several else {"color": colour("held-out")}
            canvas.plot("validation", index, (_along(run, evaluated, x), held_out), marker="o", markersize=3, **line)
    if not canvas.curves:
        return None
    _fit(canvas.axes, shown)
    drawn = {curve.name for curve in canvas.curves}
    words = {"train": ("run-0", "train (faint: as logged, line: smoothed)"), "validation": ("held-out", "validation")}
    keys = [words[name] for name in words if name in drawn]
    each = [("ink", "solid: train, smoothed; faint: as logged; dashed with dots: validation")]
    return canvas.finish("Loss" if x == "step" else "Loss by tokens", each if several else keys)


def _curve(
    runs: Mapping[int, Run],
    name: str,
    title: str,
    *,
    smooth: bool = False,
    write: Callable[[float], str] | None = None,
) -> Chart | None:
    canvas = _Canvas(runs)
    shown: list[float] = []
    for index, run in runs.items():
        points = series(run.lines, name)
        if not points[0]:
            continue
        if smooth:
            calm = smoothed(points[1])
            shown += [percentile(points[1], 0.005), percentile(points[1], 0.995), *calm]
            canvas.faint(index, points)
            canvas.read_off("as logged", index, thinned(points))
            canvas.plot("smoothed", index, thinned((points[0], calm)))
        else:
            shown += points[1]
            few = {"marker": "o", "markersize": 3} if len(points[0]) < 30 else {}
            canvas.plot(name, index, thinned(points), **few)
    if not canvas.curves:
        return None
    if min(shown) >= 0 and min(shown) < 0.5 * max(shown):
        shown.append(0.0)
    _fit(canvas.axes, shown)
    if write is not None:
        canvas.axes.yaxis.set_major_formatter(lambda value, _: write(value))
    return canvas.finish(title)


def _step_time(index: int, run: Run, *, several: bool) -> Chart | None:
    parts = time_parts(run.lines)
    if not parts:
        return None
    canvas = _Canvas({index: run})
    bands = [as_stairs(points) for points in parts.values()]
    names = [KINDS[key][0] for key in parts]
    canvas.axes.stackplot(
        bands[0][0], [values for _, values in bands], colors=[colour(name) for name in names], linewidth=0, alpha=0.9
    )
    for name, points in zip(names, parts.values(), strict=True):
        canvas.read_off(name, index, points)
    totals = [math.fsum(values) for values in zip(*(values for _, values in parts.values()), strict=True)]
    canvas.axes.set_ylim(0, 1.3 * percentile(totals, 0.9))  # the first step warms up
    canvas.axes.set_ylabel("ms per step")
    sums = {name: math.fsum(values) for name, (_, values) in zip(names, parts.values(), strict=True)}
    whole = math.fsum(sums.values()) or 1.0
    keys = [(name, f"{name} {part / whole:.1%}") for name, part in sums.items()]
    title = "Where the time of a step goes"
    return canvas.finish(f"{title}: {run.name}" if several else title, keys, index)


def _fit(axes: Axes, shown: Sequence[float]) -> None:
    low, high = min(shown), max(shown)
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - (0.05 * room if low != 0 else 0), high + 0.08 * room)


def _along(run: Run, steps: Sequence[float], x: str) -> list[float]:
    """Where `steps` are on the axis; tokens are taken to grow evenly between logged steps."""
    if x == "step":
        return list(steps)
    known, tokens = series(run.lines, "tokens")
    return [float(place) for place in np.interp(steps, [0.0, *known], [0.0, *tokens])]


def _engineering(value: float) -> str:
    from matplotlib.ticker import EngFormatter

    return str(EngFormatter(sep="")(value))


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]
