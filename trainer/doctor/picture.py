"""A heat map of what each rank or host sends to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

_INK, _NONE = "#22313f", "#e3e7ea"
_MOST_NUMBERS = 12


def draw_links(
    rates: Mapping[tuple[int, int], float], names: Sequence[str], *, bits: bool, title: str, path: Path
) -> None:
    """Write a PNG: senders as rows, receivers as columns, grey where nothing was measured.

    Args:
        rates: GB/s by sender and receiver.
        names: of both.
        bits: in Gbit/s.
        title: what it shows.
        path: the file.
    """
    from matplotlib.figure import Figure

    size, scale = len(names), 8.0 if bits else 1.0
    grid = [[scale * rates.get((row, column), math.nan) for column in range(size)] for row in range(size)]
    side = min(12.0, 3.4 + 0.45 * size)
    figure = Figure(figsize=(side + 1.6, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_NONE)
    top = max([each for row in grid for each in row if not math.isnan(each)], default=1.0)
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0.0, vmax=top)
    if size <= _MOST_NUMBERS:
        for row in range(size):
            for column in range(size):
                if not math.isnan(rate := grid[row][column]):
                    ink = _INK if 0.2 < rate / top < 0.8 else "white"
                    axes.text(column, row, f"{rate:.3g}", ha="center", va="center", color=ink, fontsize=9)
    step = max(1, size // 32)
    axes.set_xticks(range(0, size, step), [names[each] for each in range(0, size, step)], rotation=40, ha="right")
    axes.set_yticks(range(0, size, step), [names[each] for each in range(0, size, step)])
    axes.set_xlabel("receives")
    axes.set_ylabel("sends")
    axes.set_title(title, loc="left", color=_INK, fontweight="bold")
    figure.colorbar(image, ax=axes, label="Gbit/s" if bits else "GB/s", shrink=0.8)
    figure.savefig(path, metadata={"Software": None})
