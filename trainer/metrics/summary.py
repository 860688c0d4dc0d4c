"""What came of a run, in a file and in a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.metrics.jsonl import Line, read
from trainer.metrics.text import compact, duration, short

if TYPE_CHECKING:
    from rich.table import Table

_FILES = ("metrics.jsonl", "checkpoints", "plots", "samples", "logs", "tensorboard")


def write_summary(
    folder: Path,
    *,
    reason: str,
    progress: Mapping[str, float],
    times: Mapping[str, float],
    peak_memory_mib: float,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `summary.json` into the run's folder.

    Args:
        folder: the run's, with its `metrics.jsonl`.
        reason: why the run ended.
        progress: at least `step`, `tokens` and `seconds`, over all starts.
        times: seconds of this start by kind, from `StepClock.totals`.
        peak_memory_mib: the most of any rank.
        more: further entries, such as the number of parameters.

    Returns:
        What was written: plain JSON values, null for numbers that aren't finite.
    """
    lines = read(folder / "metrics.jsonl")
    seconds = float(progress.get("seconds", 0.0))
    tokens = float(progress.get("tokens", 0))
    spent = math.fsum(times.values())
    summary: dict[str, Any] = {
        "reason": reason,
        **progress,
        "tokens_per_s": tokens / seconds if tokens > 0 and seconds > 0 else None,
        "final_loss": _last(lines, "loss"),
        **{f"final_{name}": _last(lines, name) for name in _evaluated(lines)},
        **{f"best_{name}": value for name, value in _best(lines).items()},
        "this_start_s": spent,
        "time_split": {name.removesuffix("_s"): part / spent if spent > 0 else 0.0 for name, part in times.items()},
        "peak_memory_mib": peak_memory_mib,
        **(more or {}),
        "files": {name: name for name in _FILES if (folder / name).exists()},
    }
    summary = _finite(summary)
    temporary = folder / ".summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    temporary.replace(folder / "summary.json")
    return summary


def summary_table(summary: Mapping[str, Any], folder: Path) -> Table:
    """The same for people, as a table of `rich`.

    Args:
        summary: from `write_summary`.
        folder: the run's.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="Summary", title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(summary):
        table.add_row(name, value)
    table.add_row("files", f"{folder}: {', '.join(['summary.json', *summary['files']])}")
    return table


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same as pairs of name and text.

    Args:
        summary: from `write_summary`.
    """
    rows = [("ended", str(summary["reason"])), ("steps", f"{summary.get('step', 0):,.0f}")]
    rate = summary.get("tokens_per_s")
    over_all = f"  ({compact(rate)} per second over everything)" if rate is not None else ""
    rows.append(("samples", f"{summary.get('samples', 0):,.0f}"))
    if summary.get("tokens"):
        rows.append(("tokens", f"{summary['tokens']:,.0f}{over_all}"))
    rows.append(("time", f"{duration(summary.get('seconds', 0.0))}  (this start {duration(summary['this_start_s'])})"))
    if summary.get("final_loss") is not None:
        rows.append(("loss", short(summary["final_loss"])))
    for key in summary:
        name = key.removeprefix("final_")
        if name == key or name == "loss" or summary[key] is None:
            continue
        best = summary.get(f"best_{name}")
        at = "" if best is None else f"  (best {short(best['value'])} at step {best['step']})"
        rows.append((name, f"{short(summary[key])}{at}"))
    split = sorted(summary["time_split"].items(), key=lambda item: -item[1])
    rows.append(("time went into", ", ".join(f"{name} {part:.1%}" for name, part in split if part >= 0.0005)))
    rows.append(("peak memory", f"{summary['peak_memory_mib']:,.0f} MiB"))
    if summary.get("predicted"):
        rows.append(("predicted", _predicted(summary["predicted"], summary.get("prediction_error_percent") or {})))
    return rows


def _predicted(values: Mapping[str, float | None], errors: Mapping[str, float]) -> str:
    words = {
        "memory_bytes": lambda value: f"{value / 2**20:,.0f} MiB",
        "step_s": lambda value: f"{value:.3g} s per step",
    }
    return ", ".join(
        words[name](value) + (f" ({errors[name]:+.0f} % of what was measured)" if name in errors else "")
        for name, value in values.items()
        if value is not None
    )


def _evaluated(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line if "val_" in name))


def _last(lines: Sequence[Line], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


def _best(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """The lowest of each validation loss; of other metrics nobody knows which way is better."""
    found: dict[str, dict[str, float]] = {}
    for name in _evaluated(lines):
        known = [line for line in lines if name in line and math.isfinite(line[name])]
        if name.endswith("loss") and known:
            best = min(known, key=lambda line: float(line[name]))
            found[name] = {"value": best[name], "step": best["step"]}
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
