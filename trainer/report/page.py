"""The page itself: everything that it shows is in the one file, and nothing in it can ask for more."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from trainer.report import tables
from trainer.report.charts import draw_charts
from trainer.report.runs import Run
from trainer.report.svg import NUM_RUN_COLOURS


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the page about `runs`, side by side where there are several.

    Raises:
        OSError: the file can't be written.
    """
    text = render(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(loader=PackageLoader("trainer.report"), autoescape=True, undefined=StrictUndefined)
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    script = templates.loader.get_source(templates, "page.js")[0] if templates.loader else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    charts = draw_charts(runs)
    return templates.get_template("page.html").render(
        runs=runs,
        charts=charts,
        tables=tables,
        readings={f"chart-{index}": chart.data for index, chart in enumerate(charts)},
        script=script,
        digest=digest,
        num_colours=NUM_RUN_COLOURS,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
    )
