"""A picture of a plan: memory of each strategy against the device's, and speed and cost over the number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.planner.memory import Memory
from trainer.planner.report import Report, in_turn
from trainer.planner.search import Candidate

_GIB = 2**30
_MOST_BARS = 24
_LONGEST = 2.2
"""Of the device's memory: longer bars are cut there."""
_COLOURS = {
    "weights": "#3b6fb6", "gradients": "#d98032", "moments": "#5a9e5a", "gathered": "#b5524f", "activations": "#8d78b8",
    "logits": "#c5b0d5", "margin": "#c7c7c7",
}  # fmt: skip
_SPEED, _COST = "#3b6fb6", "#d98032"


@dataclass(frozen=True, kw_only=True)
class _Bar:
    name: str
    memory: Memory
    fits: bool


def draw(report: Report, path: Path) -> None:
    """Write the picture.

    Args:
        report: of whatever was predicted.
        path: of a file that ends in png, svg or pdf.
    """
    from matplotlib.figure import Figure

    bars = _bars(report)
    points = _points(report)
    height = max(3.4, 1.3 + 0.34 * len(bars))
    figure = Figure(figsize=(15.5 if points else 10, height), layout="constrained")
    if not points:
        _draw_memory(figure.subplots(), report, bars)
    else:
        left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
        _draw_memory(left.subplots(), report, bars)
        _draw_scaling(right, points)
    figure.savefig(path, dpi=120)


def _bars(report: Report) -> list[_Bar]:
    if report.machines is None:
        return [_Bar(name=name, memory=it.memory, fits=True) for name, it in report.memory_only.items()]
    first, _ = in_turn(report.found[report.nodes])
    return [_Bar(name=_name(it), memory=it.memory, fits=it.fits) for it in first[:_MOST_BARS]]


def _name(it: Candidate) -> str:
    kept = "" if it.checkpointing == "none" else f", {it.checkpointing}"
    times = f"{it.plan.accumulation} x " if it.plan.accumulation > 1 else ""
    return f"{it.strategy.replace('strategy.', '')}  ({times}{it.plan.micro_batch}{kept})"


def _draw_memory(axes: Any, report: Report, bars: Sequence[_Bar]) -> None:
    machines = report.machines
    limit = None if machines is None else machines.memory_bytes / _GIB
    longest = max((bar.memory.total / _GIB for bar in bars), default=1.0)
    end = longest if limit is None else min(max(longest, limit), _LONGEST * limit)
    scale, unit = (1.0, "GiB") if end >= 1 else (1024.0, "MiB")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for place, bar in enumerate(bars):
        start = 0.0
        for part, colour in _COLOURS.items():
            width = bar.memory.parts()[part] / _GIB * scale
            label = part if place == 0 else None
            axes.barh(place, width, left=start, color=colour, alpha=1.0 if bar.fits else 0.45, height=0.72, label=label)
            start += width
        text = f" {start:,.1f}" + ("" if bar.fits else " doesn't fit")
        at = min(start, end * scale)
        axes.text(
            at,
            place,
            text,
            va="center",
            fontsize=8,
            color="black" if bar.fits else "#8a1c1c",
            clip_on=False,
            bbox=behind,
        )
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, end * scale * 1.16)
    axes.set_xlabel(f"{unit} per device")
    axes.spines[["top", "right"]].set_visible(False)
    if limit is None or machines is None:
        title = f"{report.spec.num_parameters:,} parameters on {report.ranks} ranks"
    else:
        axes.axvline(limit * scale, color="black", linestyle="--", linewidth=1, label=f"{machines.device}: {limit:.1f}")
        where = f"{report.nodes} x {machines.name}"
        title = f"{report.spec.num_parameters:,} parameters on {where} (samples at a time, what is computed again)"
    axes.set_title(title, loc="left", fontsize=10)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False
    )


def _points(report: Report) -> list[Candidate]:
    """The best on each number of nodes, if there are several to compare."""
    best = [found[0] for _, found in sorted(report.found.items()) if found]
    found = [each for each in best if each.fits and each.speed is not None]
    return found if len(found) > 1 else []


def _draw_scaling(figure: Any, points: Sequence[Candidate]) -> None:
    sizes = [each.machines.size for each in points]
    speeds = [each.speed.tokens_per_s for each in points if each.speed is not None]
    costs = [each.usd_per_billion_tokens for each in points]
    known = all(cost is not None for cost in costs)
    all_axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    top = all_axes[0]
    top.plot(sizes, speeds, "o-", color=_SPEED, label="predicted")
    top.plot(sizes, [speeds[0] / sizes[0] * size for size in sizes], ":", color="grey", label="in proportion")
    top.set_yscale("log", base=2)
    top.set_yticks([], minor=True)
    top.margins(y=0.14)
    top.yaxis.set_major_formatter(_short)
    top.set_title("tokens/s, the best on each number of devices", loc="left", fontsize=10)
    top.legend(fontsize=8, frameon=False)
    changed = ""
    for each, speed in zip(points, speeds, strict=True):
        if each.strategy != changed:
            changed = each.strategy
            name = each.strategy.replace("strategy.", "").replace(" ", "\n")
            top.annotate(name, (each.machines.size, speed), (6, -4), textcoords="offset points", va="top", fontsize=7.5)
    if known:
        all_axes[1].plot(sizes, costs, "s-", color=_COST)
        all_axes[1].set_ylim(0, 1.15 * max(cost for cost in costs if cost is not None))
        all_axes[1].set_title("USD per 10^9 tokens", loc="left", fontsize=10)
    last = all_axes[-1]
    last.set_xscale("log", base=2)
    last.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45 if len(sizes) > 7 else 0, fontsize=8)
    last.set_xticks([], minor=True)
    last.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.6)
    last.set_xlabel("devices")
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _short(value: float, _: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
