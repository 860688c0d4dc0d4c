"""What was predicted, on a terminal."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.planner.agreement import Agreement
from trainer.planner.efficiency import Efficiency
from trainer.planner.report import Report, in_turn, training_words, words_of
from trainer.planner.search import Candidate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GIB = 2**30
_WIDTH = 120
"""Characters, where nobody looks."""
_WIDE = 120
"""From so many on there is room for more columns."""
_TIGHT = 0.9
"""Of the memory: from here on what is predicted to fit may not."""
_MOST_SETTINGS = 20
"""That are shown of one strategy."""
_TO_COPY = "train it"
"""Begins a line that the terminal is to break, if anything does."""
_KEPT = {"none": "all", "selective": "products", "selective/2": "half of products", "full": "block inputs"}
"""Way to keep fewer activations -> what is kept of them."""


def show(report: Report, *, top: int | None) -> None:
    """Print it.

    Args:
        report: whole.
        top: candidates; None: the best of each strategy, or all settings where there is one.
    """
    from rich.console import Console

    looked_at = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if looked_at else _WIDTH, highlight=False, emoji=False, markup=False)
    for line in _lines_before(report):
        console.print(line, soft_wrap=False)
    wide = console.width >= _WIDE
    console.print()
    if report.machines is None:
        console.print(_memory_table(report, top, wide=wide))
        _say_impossible(console, report)
        _say_agreement(console, report.agreement)
        return
    shown = _shown(report, top)
    tables = []
    if fitting := [each for each in shown if each.fits]:
        tables.append(_table(fitting, wide=wide))
    if others := [each for each in shown if not each.fits]:
        tables.append(_unfit_table(others, wide=wide))
    if len(report.found) > 1:
        tables.append(_scaling_table(report, wide=wide))
    if report.sensitivity:
        tables.append(_sensitivity_table(report))
    for table in tables:
        console.print(table)
        console.print()
    if (left := len(report.found[report.nodes]) - len(shown)) > 0:
        console.print(f"{left} more with other settings: --top {left + len(shown)}", style="dim")
    _say_impossible(console, report)
    for line in _lines_after(report):
        console.print(line, soft_wrap=line.startswith(_TO_COPY))
    _say_agreement(console, report.agreement)


def _say_impossible(console: Console, report: Report) -> None:
    """Each reason once."""
    for why in dict.fromkeys(report.impossible.values()):
        names = [name for name, its in report.impossible.items() if its == why]
        console.print(f"not possible: {', '.join(names)}: {why}", style="dim")


def _say_agreement(console: Console, agreement: Agreement | None) -> None:
    if agreement is None:
        return
    it = agreement
    part = "" if it.micro_batches == it.of else f", {it.micro_batches} of its {it.of} micro-batches"
    table = _empty_table(
        ["collective", "in", "ranks", "calls\npredicted", "\nsimulated", "bytes\npredicted", "\nsimulated"], left=2,
        title=f"A step of {it.strategy} as rank 0 of {it.world.size:,}{part}",
    )  # fmt: skip
    for line in it.lines():
        numbers = [f"{one[place]:,}" for place in (0, 1) for one in (line.predicted, line.simulated)]
        table.add_row(
            line.kind, line.phase, f"{line.ranks:,}", *numbers, style="red" * (line.predicted != line.simulated)
        )
    console.print()
    console.print(table)
    console.print("predicted as it is" if it.holds else "the prediction is wrong")


def _shown(report: Report, top: int | None) -> list[Candidate]:
    first, others = in_turn(report.found[report.nodes])
    most = top or (len(first) if len(first) > 1 else _MOST_SETTINGS)
    shown = {id(it) for it in [*first, *others][:most]}
    return [it for it in report.found[report.nodes] if id(it) in shown]


def _lines_before(report: Report) -> Iterator[str]:
    about = f"{report.spec.num_parameters:,} parameters, {report.tokens_per_sample:,} tokens a sample, {report.numbers}"
    machines, factors = report.machines, report.factors
    if machines is None:
        ranks = report.ranks
        yield f"{about}, on {ranks} {'rank' if ranks == 1 else 'ranks'}; speed and what fits: with a cluster (cluster)"
        return
    assert factors is not None
    nodes = report.nodes
    if machines.note:
        yield machines.note
    where = f"{nodes} x {machines.name}" if nodes > 1 else machines.name
    yield about
    yield f"on {where}: {machines.devices * nodes} x {machines.device}, {machines.memory_bytes / _GIB:.1f} GiB each"
    missing = [
        key for key, value in (
            ("cluster.memory_gb_per_s", machines.memory_bytes_per_s),
            ("cluster.link_gb_per_s", machines.link_bytes_per_s if machines.devices > 1 else 1),
            ("cluster.network_gbps", machines.network_bytes_per_s if nodes > 1 else 1),
        ) if value is None
    ]  # fmt: skip
    if missing:
        yield f"no speed can be predicted without {' and '.join(missing)}"
        return
    yield from _notes(factors)


def _notes(factors: Efficiency) -> Iterator[str]:
    """In one line what was measured elsewhere, and whatever else there is to say of the factors."""
    count = 0
    for note in factors.notes:
        names, sign, _ = note.partition(": not measured ")
        if sign:
            count += len(names.split(", "))
        else:
            yield f"note: {note}"
    if count:
        yield (
            f"note: {count} of the {len(factors.factors())} factors behind the times were measured on other devices or "
            "in other formats (docs/planner-factors.md)"
        )


def _lines_after(report: Report) -> Iterator[str]:
    best = report.best
    if best is None:
        yield "nothing fits; what would change that, the cheapest first:" if report.advice else "nothing fits"
        yield from (f"  {line}" for line in report.advice)
        return
    machines, speed = best.machines, best.speed
    said = [f"best: {best.strategy} on {machines.nodes} x {machines.name}"]
    if speed is not None:
        said.append(f"{speed.tokens_per_s:,.0f} tokens/s")
    if (days := report.days(best)) is not None and report.budget is not None:
        usd = report.usd(best)
        money = "" if usd is None else f" and {usd:,.0f} USD"
        said.append(f"{_short(report.budget.tokens)} tokens in {_days(days)} days{money}")
    yield ", ".join(said)
    if (used := best.memory.in_use / machines.memory_bytes) > _TIGHT:
        yield f"tight: {used:.0%} of a device's memory in use at the peak; predictions of it were off by up to a tenth"
    if (next_ := _runner_up(report, best)) is not None:
        yield next_
    if machines.price_per_h is not None:
        yield f"price: {machines.price_per_h * machines.nodes:,.2f} USD/h, {machines.price_note}; machines alone"
    if machines.nodes == 1:
        words = ["shardwright", "launch", "--nproc-per-node", str(machines.size)]
        yield f"{_TO_COPY}: {shlex.join([*words, *training_words(report.keys, best)])}"
    else:
        keys = shlex.join(training_words(report.keys, best))
        yield f"{_TO_COPY}, on {machines.nodes} nodes with {machines.devices} processes each: {keys}"


def _runner_up(report: Report, best: Candidate) -> str | None:
    others = [it for it in in_turn(report.found[best.machines.nodes])[0] if it.fits and it.name != best.name]
    if not others:
        return None
    other = others[0]
    if other.speed is None or best.speed is None:
        return f"next: {words_of(other)}"
    slower = 1 - other.speed.tokens_per_s / best.speed.tokens_per_s
    return f"next: {other.strategy}, {'as fast' if slower < 0.0005 else f'{slower:.1%} slower'}"


def _empty_table(heads: Sequence[str], *, left: int = 1, title: str | None = None) -> Table:
    """With heads of columns, of which the first few are texts."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < left else "right", no_wrap=True)
    return table


def _table(candidates: Sequence[Candidate], *, wide: bool) -> Table:
    heads = ["strategy", "activa-\ntions kept", "micro-\nbatch", "GiB", "step\n(s)"]
    heads += ["waits\n(s)", "TFLOP/s per\ndevice"] if wide else []
    table = _empty_table([*heads, "tokens/s", "MFU", "USD per\n10^9 tokens"], left=2)
    for it in candidates:
        speed, usd = it.speed, it.usd_per_billion_tokens
        rates = ["-"] * (5 if wide else 3)
        if speed is not None:
            rates = [f"{speed.step_s:,.3g}"]
            rates += [f"{speed.exposed_s:,.2g}", f"{speed.flops_per_s / 1e12:,.0f}"] if wide else []
            rates += [f"{speed.tokens_per_s:,.0f}", f"{speed.utilisation:.1%}"]
        kept, memory = _KEPT.get(it.checkpointing, it.checkpointing), f"{it.memory.total / _GIB:,.1f}"
        table.add_row(_named(it, wide), kept, _batch(it), memory, *rates, "-" if usd is None else _usd(usd))
    return table


def _unfit_table(candidates: Sequence[Candidate], *, wide: bool) -> Table:
    table = _empty_table(["doesn't fit", "why, and most of what it takes on a device (GiB)"], left=2)
    table.columns[1].no_wrap = False
    for it in candidates:
        parts = sorted(it.memory.parts().items(), key=lambda part: -part[1])[:3]
        most = ", ".join(f"{name} {size / _GIB:,.1f}" for name, size in parts)
        table.add_row(_named(it, wide), f"{it.why_not}: {most}", style="dim")
    return table


def _named(it: Candidate, wide: bool) -> str:
    short = it.strategy.replace("strategy.", "")
    return short if wide else short.replace(" ", "\n ")


def _batch(it: Candidate) -> str:
    plan = it.plan
    return f"{plan.accumulation} x {plan.micro_batch}" if plan.accumulation > 1 else str(plan.micro_batch)


def _days(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _short(value: float) -> str:
    """Such as 1e12."""
    digits, _, power = f"{value:.3g}".partition("e+")
    return f"{digits}e{int(power)}" if power else digits


def _usd(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:,.3g}"


def _scaling_table(report: Report, *, wide: bool) -> Table:
    heads = ["nodes", "devices", "strategy", "tokens/s", "MFU", "USD per\n10^9 tokens"]
    heads[4:4] = ["per\ndevice"] if wide else []
    heads += ["days", "USD"] if report.budget is not None else []
    table = _empty_table(heads, left=0, title="The best on each number of nodes")
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for nodes, candidates in sorted(report.found.items()):
        best = candidates[0] if candidates else None
        if best is None or not best.fits:
            table.add_row(str(nodes), "", "nothing fits", style="dim")
            continue
        row = [str(nodes), f"{best.machines.size:,}", _named(best, True)]
        if (speed := best.speed) is not None:
            row.append(f"{speed.tokens_per_s:,.0f}")
            row += [f"{speed.tokens_per_s / best.machines.size:,.0f}"] if wide else []
            row.append(f"{speed.utilisation:.1%}")
            usd, days, money = best.usd_per_billion_tokens, report.days(best), report.usd(best)
            row.append("-" if usd is None else _usd(usd))
            row += [] if days is None else [_days(days), "-" if money is None else f"{money:,.0f}"]
        table.add_row(*row)
    return table


def _sensitivity_table(report: Report) -> Table:
    factors = report.factors
    assert factors is not None
    table = _empty_table(["factor", "value", "tokens/s"], title="The best's tokens/s, if a factor is a tenth lower")
    for name, change in sorted(report.sensitivity.items(), key=lambda entry: -abs(entry[1])):
        table.add_row(name, f"{getattr(factors, name):.3g}", f"{change:+.1%}")
    return table


def _memory_table(report: Report, top: int | None, *, wide: bool) -> Table:
    rows = list(report.memory_only.items())[:top]
    unit, name = (_GIB, "GiB") if max(it.memory.total for _, it in rows) >= _GIB else (2**20, "MiB")
    heads = ["strategy", "weights", "gradi-\nents", "moments", "gath-\nered", "activa-\ntions"]
    heads += ["logits", "margin"] if wide else []
    table = _empty_table([*heads, "total", "host or\ndisk", *(["sent in\na step"] if wide else [])])
    table.title = f"{name} per rank"
    for strategy, it in rows:
        taken = it.memory
        kept = [taken.weights, taken.gradients, taken.moments, taken.gathered]
        last = [taken.activations, taken.logits, taken.margin]
        amounts = [*kept, *(last if wide else [sum(last)]), taken.total, taken.host + taken.nvme]
        amounts += [it.sent_bytes] if wide else []
        table.add_row(strategy, *(f"{amount / unit:,.1f}" if amount else "-" for amount in amounts))
    return table


class Progress:
    """What is being done, on stderr while it is, where that is a terminal."""

    def __enter__(self) -> Progress:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        columns = (progress.TextColumn("plan"), progress.BarColumn(), progress.TimeElapsedColumn())
        self._bar = progress.Progress(
            *columns, progress.TextColumn("{task.description}", markup=False), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, doing: str) -> None:
        """Now it is this."""
        self._bar.update(self._task, description=doing)
