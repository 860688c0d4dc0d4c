"""What the runs of a benchmark took, side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from strategies.precision import Numbers
from trainer.bench.runs import MODELS, Case, Saves, Taken
from trainer.metrics.throughput import peak_flops, training_flops_per_token

_EXPLAINED = """\
Both sides train the same Llama of transformers on the same bytes with AdamW (fused, no decay for norms), the gradient
clipped to norm 1 and a cosine rate; both write a line with loss, gradient norm and rate every 10 steps. single: no
process group. ddp: DistributedDataParallel, gradients as views of buckets, static graph, buffers left alone. fsdp_full,
fsdp_hybrid: `fully_shard` by layer, the root kept gathered; in bf16 the loop casts weights when it gathers them. zero1,
zero2, zero3: `deepspeed.initialize` with torch's AdamW and buckets of as many numbers as ours. horovod:
`DistributedOptimizer`, both sides under horovodrun. compile: the whole model, or under FSDP each layer. The
hand-written loop (`scripts/bench_loop.py`) does that and nothing else. Ours (`scripts/bench_ours.py`) is
`scripts/train.py` without other loggers than `metrics.jsonl`; besides, it agrees on the counted tokens and on stops,
skips steps that aren't finite, reduces the logged loss over the ranks, keeps the step's times, and can be stopped and
resumed.

A round is the hand-written loop, ours, and the hand-written loop again. A ratio is ours over the mean of the two; the
A/A ratio is the second over the first, so what it shows is the machine. CPU time is that of all processes, user and
system, from step 20 on; start-up goes from launch to the end of the first step; memory is that of the largest process
before the first checkpoint."""


@dataclass(kw_only=True)
class Results:
    """The rounds of one case."""

    case: Case
    ours: list[Taken] = field(default_factory=list)
    before: list[Taken] = field(default_factory=list)
    """The hand-written loop, ahead of ours in each round."""
    after: list[Taken] = field(default_factory=list)
    """The same, behind."""
    loop_saves_s: list[float] = field(default_factory=list)
    waited_for: Saves | None = None
    """Checkpoints of ours for which the steps wait."""
    background: Saves | None = None
    """Those that are written while training goes on."""


def to_markdown(results: Sequence[Results], title: str) -> str:
    """A page with the hardware and all tables."""
    parts = [f"# {title}", "\n".join(f"- {line}" for line in _hardware()), _EXPLAINED]
    for found in results:
        model = MODELS[found.case.model]
        parts.append(
            f"## {found.case.model}, {_processes(found.case)}, {_setting(found.case)}\n\n"
            f"{model.layers} layers of width {model.hidden}, {model.vocabulary} tokens; {model.batch} samples of "
            f"length {model.length} per process; {found.case.steps} steps, {len(found.ours)} rounds."
        )
        parts.append(_table(["", "ours", "by hand", "ours / by hand", "A/A"], _rows(found)))
        if found.waited_for is not None or found.background is not None:
            parts.append(_table(["checkpoints", "complete after", "steps wait", "of a plain save"], _save_rows(found)))
        if found.background is not None:
            parts.append(_slowing(found.background))
    return "\n\n".join(parts) + "\n"


def to_json(results: Sequence[Results]) -> str:
    """Every number of every round."""
    return json.dumps({"hardware": _hardware(), "results": [dataclasses.asdict(found) for found in results]}, indent=1)


def _rows(found: Results) -> list[list[str]]:
    def row(name: str, unit: str, of: Callable[[Taken], float], digits: int) -> list[str]:
        ours, before, after = ([of(taken) for taken in side] for side in (found.ours, found.before, found.after))
        by_hand = [(x + y) / 2 for x, y in zip(before, after, strict=True)]
        ratios = [x / y for x, y in zip(ours, by_hand, strict=True)]
        same = [y / x for x, y in zip(before, after, strict=True)]
        values = [f"{statistics.median(side):,.{digits}f}" for side in (ours, by_hand)]
        return [f"{name} ({unit})", *values, _spread(ratios), _spread(same)]

    rows = [
        row("CPU time per step", "ms", lambda taken: taken.cpu_ms_per_step, 2),
        row("throughput", "tokens/s", lambda taken: taken.tokens_per_s, 0),
        row("start-up", "s", lambda taken: taken.startup_s, 2),
        row("peak memory", "MiB", lambda taken: taken.peak_mib, 0),
    ]
    if (peak := _peak_flops(found.case)) is not None:
        rows.append(row("MFU", "%", lambda taken: 100 * taken.tokens_per_s * _flops(found.case) / peak, 1))
    more = [
        o.startup_s - (b.startup_s + a.startup_s) / 2
        for o, b, a in zip(found.ours, found.before, found.after, strict=True)
    ]
    apart = [a.startup_s - b.startup_s for b, a in zip(found.before, found.after, strict=True)]
    return [*rows, ["start-up, ours more (s)", "", "", _spread(more, "+.2f"), _spread(apart, "+.2f")]]


def _save_rows(found: Results) -> list[list[str]]:
    plain = statistics.median(found.loop_saves_s) if found.loop_saves_s else None
    rows = (
        [] if plain is None else [["plain torch.distributed.checkpoint.save", f"{plain:.2f} s", f"{plain:.2f} s", "1"]]
    )
    for name, saves in (("ours", found.waited_for), ("ours, checkpoint.async_save=true", found.background)):
        if saves is None:
            continue
        first, rest = saves.stalls_s[0], saves.stalls_s[1:] or saves.stalls_s
        share = "" if plain is None else f"{statistics.median(rest) / plain:.2f} (first: {first / plain:.2f})"
        stall = f"{statistics.median(rest):.2f} s (first: {first:.2f} s)"
        rows.append([name, f"{statistics.median(saves.seconds):.2f} s", stall, share])
    return rows


def _slowing(saves: Saves) -> str:
    if saves.overlapped_step_s is None:
        return "Each background save ended within the step after it."
    return (
        f"A step that a background save overlaps takes {saves.overlapped_step_s:.3f} s in the mean, one that none "
        f"overlaps {saves.quiet_step_s:.3f} s ({saves.overlapped_step_s / saves.quiet_step_s:.2f} times)."
    )


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _processes(case: Case) -> str:
    return "1 process" if case.processes == 1 else f"{case.processes} processes"


def _setting(case: Case) -> str:
    return f"{case.strategy}, {case.precision}{', compile' if case.compile else ''}"


def _flops(case: Case) -> float:
    """Per token."""
    model = MODELS[case.model]
    return training_flops_per_token(
        model.num_parameters, layers=model.layers, width=model.hidden, sequence=model.length
    )


def _peak_flops(case: Case) -> float | None:
    """Of all devices together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, Numbers[case.precision])
    return None if peak is None else peak * case.processes


def _hardware() -> list[str]:
    devices: list[Any] = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    return [
        f"processor: {_processor()}, {os.cpu_count()} cores",
        f"device: {', '.join(devices) or 'none, on CPU'}",
        f"load when it was written: {os.getloadavg()[0]:.1f}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}",
    ]


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
