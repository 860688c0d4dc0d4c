"""Pictures of a run, from its `metrics.jsonl` alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.metrics.jsonl import Line, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[float], list[float]]
"""x and y."""

_MOST_POINTS = 2000
_INK, _GREY, _GRID = "#22313f", "#7f8c8d", "#e3e7ea"
_BLUE, _ORANGE = "#1f77b4", "#d95f02"
KINDS = {
    "compute_s": ("compute", "#4c9f8b"),
    "communication_s": ("communication", "#e0a33e"),
    "data_s": ("data", "#5b8bd0"),
    "checkpoint_s": ("checkpoint", "#c25b56"),
}


def write_plots(folder: Path, resumes: Sequence[int], say: Callable[[str], None]) -> list[Path]:
    """Draw `plots/loss.png` and `plots/step_time.png` of the run in `folder`.

    Whatever goes wrong is told and doesn't end the run.

    Args:
        folder: the run's, with its `metrics.jsonl`.
        resumes: steps after which the run went on.
        say: tells the person at the terminal.

    Returns:
        The files; fewer where there was nothing to draw.
    """
    written: list[Path] = []
    try:
        lines = read(folder / "metrics.jsonl")
        for name, figure in (("loss", draw_loss(lines, resumes)), ("step_time", draw_step_time(lines, resumes))):
            if figure is not None:
                written.append(save(figure, folder / "plots" / f"{name}.png"))
    except Exception as error:  # a picture isn't worth a run
        say(f"the plots could not be drawn: {type(error).__name__}: {error}")
    return written


def draw_loss(lines: Sequence[Line], resumes: Sequence[int] = ()) -> Figure | None:
    """Training loss, as it is and smoothed, validation loss, and the learning rate below.

    Args:
        lines: from `trainer.metrics.jsonl.read`.
        resumes: steps to mark.

    Returns:
        None if no loss was logged.
    """
    from matplotlib.figure import Figure

    train, held_out, rate = (series(lines, name) for name in ("loss", "val_loss", "lr"))
    if not train[0] and not held_out[0]:
        return None
    figure = Figure(figsize=(10, 5.8), dpi=120, layout="constrained")
    rows = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1)) if rate[0] else [figure.subplots()]
    axes: Axes = rows[0]
    style(axes)
    smooth = smoothed(train[1])
    if train[0]:
        axes.plot(*thinned(train), color=_BLUE, alpha=0.25, linewidth=1, label="train")
        axes.plot(*thinned((train[0], smooth)), color=_BLUE, linewidth=2, label="train, smoothed")
    if held_out[0]:
        axes.plot(*held_out, color=_ORANGE, linewidth=1.5, marker="o", markersize=4.5, label="validation")
        axes.annotate(
            f"{held_out[1][-1]:.4f}", (held_out[0][-1], held_out[1][-1]), xytext=(-6, 9), textcoords="offset points",
            color=_ORANGE, ha="right",
        )  # fmt: skip
    shown = [*smooth, *held_out[1]]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_ylabel("loss")
    axes.set_title("Loss", loc="left", color=_INK, fontweight="bold")
    if rate[0]:
        style(rows[1])
        rows[1].plot(*thinned(rate), color=_GREY, linewidth=1.5)
        rows[1].set_ylabel("learning rate")
        rows[1].set_ylim(bottom=0)
        rows[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    for each in rows:
        _mark(each, resumes)
    rows[-1].set_xlabel("optimizer step")
    axes.legend(frameon=False, loc="upper right")
    return figure


def draw_step_time(lines: Sequence[Line], resumes: Sequence[int] = ()) -> Figure | None:
    """What the time of a step went into, over the run.

    Args:
        lines: from `trainer.metrics.jsonl.read`.
        resumes: steps to mark.

    Returns:
        None if no times were logged.
    """
    parts = time_parts(lines)
    if not parts:
        return None
    from matplotlib.figure import Figure

    sums = {key: math.fsum(values) for key, (_, values) in parts.items()}
    whole = math.fsum(sums.values()) or 1.0
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    axes: Axes = figure.subplots()
    style(axes)
    # The window of a point reaches back to the one before.
    bands = [as_stairs(points) for points in parts.values()]
    axes.stackplot(
        bands[0][0],
        [values for _, values in bands],
        labels=[f"{KINDS[key][0]}  {sums[key] / whole:.1%}" for key in parts],
        colors=[KINDS[key][1] for key in parts],
        linewidth=0,
    )
    totals = [math.fsum(values) for values in zip(*(values for _, values in parts.values()), strict=True)]
    axes.set_ylim(0, 1.15 * percentile(totals, 0.98))
    axes.set_xlim(bands[0][0][0], bands[0][0][-1])
    axes.set_ylabel("ms per step")
    axes.set_xlabel("optimizer step")
    axes.set_title("Where the time of a step goes", loc="left", color=_INK, fontweight="bold")
    _mark(axes, resumes)
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def time_parts(lines: Sequence[Line]) -> dict[str, Points]:
    """Milliseconds of a step by kind (keys of `KINDS`), all at the same steps; {} if no times were logged."""
    timed = [line for line in lines if "step_s" in line]
    if not timed:
        return {}
    steps = [float(line["step"]) for line in timed]
    parts: dict[str, Points] = {}
    for key in KINDS:
        values = [1000 * _finite_or_zero(line.get(key, 0.0)) for line in timed]
        if any(values):
            parts[key] = thinned((steps, values))
    return parts or {"compute_s": thinned((steps, [1000 * _finite_or_zero(line["step_s"]) for line in timed]))}


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over about a fiftieth of the values, centred, so that the curve doesn't lag behind."""
    sums = [0.0, *itertools.accumulate(values)]
    half = len(values) // 100 + (len(values) > 10)
    found = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        found.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return found


def thinned(points: Points) -> Points:
    """At most 2000 points: means of neighbours, so that a long run is as quick to draw as a short one."""
    xs, ys = points
    if len(xs) <= _MOST_POINTS:
        return points
    size = math.ceil(len(xs) / _MOST_POINTS)
    groups = range(0, len(xs), size)
    return (
        [xs[min(begin + size, len(xs)) - 1] for begin in groups],
        [math.fsum(ys[begin : begin + size]) / len(ys[begin : begin + size]) for begin in groups],
    )


def extremes(points: Points) -> Points:
    """At most 2000 points that keep every peak: the lowest and the highest of neighbours."""
    xs, ys = points
    if len(xs) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(xs) / _MOST_POINTS)
    kept: list[int] = []
    for begin in range(0, len(xs), size):
        group = range(begin, min(begin + size, len(xs)))
        kept += sorted({min(group, key=ys.__getitem__), max(group, key=ys.__getitem__)})
    return [xs[index] for index in kept], [ys[index] for index in kept]


def series(lines: Sequence[Line], name: str) -> Points:
    """The steps at which `name` was logged, and its values; those that aren't finite are left out."""
    found = [
        (float(line["step"]), float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    return [x for x, _ in found], [y for _, y in found]


def _finite_or_zero(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def as_stairs(points: Points) -> Points:
    """Each value as a level that reaches back to the point before, since that is where its window began."""
    xs, ys = points
    width = xs[1] - xs[0] if len(xs) > 1 else 1.0
    edges = [xs[0] - width, *xs]
    stairs = [(edges[i + side], y) for i, y in enumerate(ys) for side in (0, 1)]
    return [x for x, _ in stairs], [y for _, y in stairs]


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of them lie; 1 in place of 0, so that an axis has a length."""
    return sorted(values)[round(part * (len(values) - 1))] or 1.0


def style(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK)


def _mark(axes: Axes, resumes: Sequence[int]) -> None:
    for index, step in enumerate(sorted(set(resumes))):
        label = "resumed" if index == 0 else None
        axes.axvline(step, color=_INK, linestyle=(0, (4, 3)), linewidth=1, label=label)


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, in one go: at every moment there is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path
