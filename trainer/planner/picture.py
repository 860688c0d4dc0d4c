"""A picture of a plan: memory of each strategy against the device's, and speed and cost over the number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.planner.report import Report

_GIB = 2**30
_MOST_BARS = 16
_COLOURS = {
    "weights": "#3b6fb6", "gradients": "#d98032", "moments": "#5a9e5a", "gathered": "#b5524f", "activations": "#8d78b8",
    "logits": "#c5b0d5", "margin": "#c7c7c7",
}  # fmt: skip


def draw(report: Report, path: Path) -> None:
    """Write the picture.

    Args:
        report: with machines.
        path: of a file that ends in png, svg or pdf.
    """
    from matplotlib.figure import Figure

    several = len(report.found) > 1
    figure = Figure(figsize=(15 if several else 9, 6), layout="constrained")
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _memory(axes[0], report)
    if several:
        _scaling(axes[1], report)
    figure.savefig(path, dpi=120)


def _memory(axes: Any, report: Report) -> None:
    best = report.best
    nodes = best.machines.nodes if best is not None else min(report.found)
    candidates = report.found[nodes][:_MOST_BARS][::-1]
    left = [0.0] * len(candidates)
    for part, colour in _COLOURS.items():
        widths = [each.memory.parts()[part] / _GIB for each in candidates]
        axes.barh(range(len(candidates)), widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    assert report.machines is not None
    limit = report.machines.memory_bytes / _GIB
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(limit, len(candidates) - 0.4, f" {report.machines.device}", va="bottom", fontsize=8)
    names = [
        f"{each.strategy}\n{each.checkpointing}, {each.plan.micro_batch} x {each.plan.accumulation}"
        for each in candidates
    ]
    axes.set_yticks(range(len(candidates)), names, fontsize=7)
    axes.set_xlim(0, min(max(*left, limit), 2.5 * limit) * 1.05)
    axes.set_xlabel("GiB per device")
    axes.set_title(f"memory on {nodes} x {report.machines.name}", loc="left", fontsize=10)
    axes.legend(fontsize=7, loc="lower right")


def _scaling(axes: Any, report: Report) -> None:
    points = [
        (found[0].machines.size, found[0]) for _, found in sorted(report.found.items()) if found and found[0].fits
    ]
    points = [point for point in points if point[1].speed is not None]
    if not points:
        axes.set_axis_off()
        return
    sizes = [size for size, _ in points]
    speeds = [each.speed.tokens_per_s for _, each in points if each.speed is not None]
    axes.plot(sizes, speeds, "o-", color="#3b6fb6", label="tokens/s")
    axes.plot(sizes, [speeds[0] / sizes[0] * size for size in sizes], ":", color="#3b6fb6", label="in proportion")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("devices")
    axes.set_ylabel("tokens/s")
    handles, labels = axes.get_legend_handles_labels()
    costs = [each.usd_per_billion_tokens for _, each in points]
    if all(cost is not None for cost in costs):
        other = axes.twinx()
        other.plot(sizes, costs, "s-", color="#d98032", label="USD per 10^9 tokens")
        other.set_ylim(bottom=0)
        other.set_ylabel("USD per 10^9 tokens")
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, fontsize=8, loc="upper left")
    axes.set_title("throughput and cost, each with its best", loc="left", fontsize=10)
