"""What a sweep came to: a table, `comparison.csv` and `comparison.png`."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.launch.book import Entry, Objective, Standing
from trainer.launch.search import readable
from trainer.metrics.plots import Points, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED = 8
_MOST_PARAMETERS = 3
_GREY, _INK = "#9aa5ad", "#22313f"
_MANY = 20.0
"""Between smallest and largest value: from here on an axis counts orders of magnitude."""


def write_csv(path: Path, entries: Sequence[Entry], objective: Objective) -> None:
    """One row for each job, the best one first; numbers as they are."""
    name = objective.named(entries)
    keys = list(dict.fromkeys(key for entry in entries for key in entry.values))
    more = {each for entry in entries for each in entry.metrics if each.startswith("val_") or each == "loss"} - {name}
    head = ["job", "state", *keys, "step", name, *sorted(more), "seconds", "folder", "why"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for entry in objective.ranked(entries):
            numbers = [entry.metrics.get(each, "") for each in ("step", name, *sorted(more))]
            values = [entry.values.get(key, "") for key in keys]
            rest = [round(entry.seconds, 1), path.parent / entry.name, entry.detail]
            writer.writerow([entry.name, entry.standing.value, *values, *numbers, *rest])


def draw(entries: Sequence[Entry], objective: Objective) -> Figure | None:
    """The objective over the steps of each job, and where each ended over what was varied.

    Returns:
        None: no job has a value of it.
    """
    from matplotlib.figure import Figure

    name = objective.named(entries)
    ranked = [entry for entry in objective.ranked(entries) if any(entry.curves.get(name, {}))]
    if not ranked:
        return None
    keys = _varied(ranked)[:_MOST_PARAMETERS]
    figure = Figure(figsize=(6.5 + 3.2 * len(keys), 5), dpi=120, layout="constrained")
    columns = figure.subplots(1, 1 + len(keys), width_ratios=[2.0, *(1.0 for _ in keys)], squeeze=False)[0]
    colors = _colors(ranked)
    _draw_curves(columns[0], ranked, name, colors)
    for axes, key in zip(columns[1:], keys, strict=True):
        _draw_parameter(axes, ranked, name, key, objective, colors)
    low, high = _shown_range(ranked, name, objective)
    for axes in columns:
        axes.set_ylim(low, high)
    handles, labels = columns[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside lower left", ncols=1 + len(keys))
    which = "largest" if objective.maximize else "smallest"
    columns[0].set_title(f"{name} of {len(ranked)} jobs, {which} is best", loc="left", color=_INK, fontweight="bold")
    return figure


def write_picture(path: Path, entries: Sequence[Entry], objective: Objective) -> bool:
    """Draw it into a file; False: there is nothing to draw."""
    figure = draw(entries, objective)
    if figure is not None:
        save(figure, path)
    return figure is not None


def _colors(ranked: Sequence[Entry]) -> dict[str, str]:
    """The best ones from dark to light; grey for the rest, and for what didn't come to its end."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    named = [entry for entry in ranked if entry.standing is Standing.finished][:_MOST_NAMED]
    shades = colormaps["viridis"]
    found = {entry.name: _GREY for entry in ranked}
    return found | {entry.name: to_hex(shades(0.9 * i / max(1, len(named) - 1))) for i, entry in enumerate(named)}


def _draw_curves(axes: Axes, ranked: Sequence[Entry], name: str, colors: dict[str, str]) -> None:
    style(axes)
    for place, entry in enumerate(ranked):
        steps, values = _points(entry, name)
        best = place == 0
        over = entry.standing is Standing.finished
        label = " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in entry.values.items())
        label = label or entry.name
        state = "" if over else f" ({entry.standing.value})"
        shown = f"{label}{state}" if place < _MOST_NAMED else "_"
        axes.plot(
            steps,
            values,
            color=colors[entry.name],
            linewidth=2.4 if best else 1.3,
            linestyle="-" if over else (0, (4, 2)),
            marker="o" if len(steps) <= 20 else "",
            markersize=3.5,
            zorder=10 - min(place, 8),
            label=shown,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name)


def _draw_parameter(
    axes: Axes, ranked: Sequence[Entry], name: str, key: str, objective: Objective, colors: dict[str, str]
) -> None:
    style(axes)
    there = [(entry, value) for entry in ranked if (value := objective.value(entry, name)) is not None]
    texts = [entry.values.get(key, "") for entry, _ in there]
    numbers = [_as_number(text) for text in texts]
    if None in numbers:
        known = sorted(set(texts))
        places: list[float] = [float(known.index(text)) for text in texts]
        axes.set_xticks(range(len(known)), [_short(text) for text in known], rotation=30, ha="right")
        axes.set_xlim(-0.5, len(known) - 0.5)
    else:
        places = [number for number in numbers if number is not None]
        if places and min(places) > 0 and max(places) / min(places) >= _MANY:
            axes.set_xscale("log")
    for (entry, value), place in zip(there, places, strict=True):
        over = entry.standing is Standing.finished
        axes.plot(place, value, marker="o" if over else "x", color=colors[entry.name], markersize=7 if over else 6)
    axes.set_xlabel(key)


def _shown_range(ranked: Sequence[Entry], name: str, objective: Objective) -> tuple[float, float]:
    """Of the axis: the ends of the better nine tenths, and each curve but its start, so that one job that goes to
    infinity doesn't flatten the others.
    """
    ends = sorted(value for entry in ranked if (value := objective.value(entry, name)) is not None)
    if objective.maximize:
        ends = ends[len(ends) // 10 :]
    else:
        ends = ends[: math.ceil(0.9 * len(ends))]
    tails = [value for entry in ranked[: len(ends)] for value in _tail(_points(entry, name)[1])]
    shown = [*ends, *tails] or [0.0, 1.0]
    margin = 0.06 * (max(shown) - min(shown) or abs(max(shown)) or 1.0)
    return min(shown) - margin, max(shown) + margin


def _tail(values: list[float]) -> list[float]:
    return values[len(values) // 4 :]


def _points(entry: Entry, name: str) -> Points:
    found = [(float(step), value) for step, value in entry.curves.get(name, {}).items() if math.isfinite(value)]
    return [x for x, _ in found], [y for _, y in found]


def _varied(entries: Sequence[Entry]) -> list[str]:
    keys = dict.fromkeys(key for entry in entries for key in entry.values)
    return [key for key in keys if len({entry.values.get(key) for entry in entries}) > 1]


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    text = readable(text)
    return text if len(text) < 25 else f"{text[:22]}..."
