"""Figures as SVG inside of a page, in colours that the page's style decides."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_RUN_COLOURS = 8
_NAMES = ("ink", "muted", "grid", "held-out", "kill", "change", "warning", "rollback", "compute", "communication",
          "data", "checkpoint", *(f"run-{index}" for index in range(NUM_RUN_COLOURS)))  # fmt: skip
_STAND_INS = {name: f"#0000{index + 1:02x}" for index, name in enumerate(_NAMES)}


def colour(name: str) -> str:
    """A stand-in for the style sheet's `--<name>`, which becomes it again in `to_svg`."""
    return _STAND_INS[name]


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside of this: text stays text, and the same figure gives the same bytes."""
    import matplotlib as mpl

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "shardwright",
        "font.size": 9.5,
        "text.color": colour("ink"),
        "axes.edgecolor": colour("muted"),
        "axes.labelcolor": colour("muted"),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": colour("grid"),
        "grid.linewidth": 0.7,
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
    }
    with mpl.rc_context(settings):
        yield


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element; what was drawn with the gid `run-N` gets that as its class.

    Args:
        figure: drawn with `colour`.
        title: for those who can't see it; plain text.
    """
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib always writes one"
    text = f'<svg {box.group()} role="img" aria-label="{escape(title)}">' + text[text.index(">") + 1 :]
    for name, stand_in in _STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return _own_ids(text.replace("xlink:href", "href")).strip()


def _own_ids(text: str) -> str:
    """Ids that nothing else in the page has, and only where something refers to them."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"

    def rename(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in used:
            return f' id="{prefix}{name}"'
        return f' class="{name}"' if re.fullmatch(r"run-\d+", name) else ""

    text = re.sub(r' id="([^"]*)"', rename, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
