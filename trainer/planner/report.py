"""What was predicted, for people and for programs: tables, `plan.json`, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.base import Footprint, ModelSpec
from strategies.errors import ConfigError
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.memory import Memory
from trainer.planner.search import Candidate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GIB = 2**30
_COST = "USD/10^9 tokens"
_KEPT = {
    "none": "all",
    "selective": "products",
    "selective/2": "every 2nd product",
    "full": "inputs of blocks",
}
"""Way to keep fewer activations -> what is kept of them."""


@dataclass(kw_only=True)
class Report:
    """Everything that a plan found."""

    spec: ModelSpec
    tokens: float | None = None
    """To train on."""
    overhead: float = 0.0
    """Share of the time that saves and restarts take."""
    ranks: int = 1
    """Without machines."""
    machines: Machines | None = None
    factors: Efficiency | None = None
    found: dict[int, list[Candidate]] = field(default_factory=dict)
    """Number of nodes -> candidates, best first."""
    memory_only: dict[str, tuple[Footprint, Memory]] = field(default_factory=dict)
    refused: dict[int, dict[str, str]] = field(default_factory=dict)
    """Number of nodes -> what can't run on so many ranks -> why; without machines 0."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def best(self) -> Candidate | None:
        """On the fewest nodes on which something fits."""
        fitting = (each[0] for _, each in sorted(self.found.items()) if each and each[0].fits)
        return next(fitting, None)

    def days(self, candidate: Candidate) -> float | None:
        """For all tokens; None: they or the speed aren't known."""
        if self.tokens is None or candidate.speed is None:
            return None
        return self.tokens / candidate.speed.tokens_per_s / 86400 / (1 - self.overhead)

    def usd(self, candidate: Candidate) -> float | None:
        """For all tokens; None: the price isn't known either."""
        days, price = self.days(candidate), candidate.machines.price_per_h
        return None if days is None or price is None else days * 24 * price * candidate.machines.nodes


def show(report: Report, *, top: int) -> None:
    """Print it."""
    from rich.console import Console

    console = Console()
    if report.machines is None:
        console.print(_memory_table(report))
        return
    best = report.best
    shown = best.machines.nodes if best is not None else min(report.found)
    for line in _lines_before(report, shown):
        console.print(line, highlight=False)
    console.print(_table(report, report.found[shown][:top]))
    if (left := len(report.found[shown]) - top) > 0:
        console.print(f"{left} more: --top {len(report.found[shown])}")
    for name, why in report.refused.get(shown, {}).items():
        console.print(f"left out: {name}: {why}", highlight=False, style="dim")
    if len(report.found) > 1:
        console.print(_scaling_table(report))
    if report.sensitivity:
        console.print(_sensitivity_table(report))
    _say_best(console, report)


def _say_best(console: Console, report: Report) -> None:
    best = report.best
    if best is None:
        console.print("nothing fits; what would change that, the cheapest first:" if report.advice else "nothing fits")
        for line in report.advice:
            console.print(f"  {line}", highlight=False)
        return
    console.print(f"best: {words_of(best)}", highlight=False)
    assert report.machines is not None
    if best.machines.price_per_h is not None:
        console.print(f"price: {best.machines.price_note}; machines alone", highlight=False, style="dim")
    if report.tokens is not None and (days := report.days(best)) is not None:
        usd = report.usd(best)
        money = "" if usd is None else f", {usd:,.0f} USD"
        console.print(
            f"{report.tokens:.3g} tokens: {days:,.1f} days{money} on {best.machines.nodes} x {best.machines.name}"
        )


def words_of(candidate: Candidate) -> str:
    """The keys that choose a candidate."""
    way, _, products = candidate.checkpointing.partition("/")
    words = [f"strategy={candidate.strategy}", f"trainer.micro_batch={candidate.plan.micro_batch}"]
    size = candidate.plan.micro_batch * candidate.plan.accumulation * candidate.machines.size
    words.append(f"trainer.global_batch={size}")
    if way != "none":
        words.append(f"trainer.activation_checkpointing={way}")
    if products:
        words.append(f"trainer.activation_checkpointing_products_every={products}")
    return " ".join(words)


def _lines_before(report: Report, nodes: int) -> Iterator[str]:
    machines, factors = report.machines, report.factors
    assert machines is not None
    assert factors is not None
    if machines.note:
        yield machines.note
    where = f"{nodes} x {machines.name}" if nodes > 1 else machines.name
    yield (
        f"{report.spec.num_parameters:,} parameters on {where}: {machines.devices * nodes} x {machines.device}, "
        f"{machines.memory_bytes / _GIB:.1f} GiB each"
    )
    missing = [
        key for key, value in (
            ("cluster.memory_gb_per_s", machines.memory_bytes_per_s),
            ("cluster.link_gb_per_s", machines.link_bytes_per_s if machines.devices > 1 else 1),
            ("cluster.network_gbps", machines.network_bytes_per_s if nodes > 1 else 1),
        ) if value is None
    ]  # fmt: skip
    if missing:
        yield f"no speed can be predicted without {' and '.join(missing)}"
    for note in factors.notes:
        yield f"note: {note}"


def _table(report: Report, candidates: list[Candidate]) -> Table:
    from rich.table import Table

    table = Table(title_justify="left")
    columns = (
        "strategy",
        "activations kept",
        "batch",
        "GiB",
        "step (s)",
        "waits (s)",
        "tokens/s",
        "MFU",
        "USD/10^9 tokens",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number < 2)
    for it in candidates:
        plan, speed, usd = it.plan, it.speed, it.usd_per_billion_tokens
        rates = ["-"] * 4
        if speed is not None:
            rates = [f"{speed.step_s:,.3g}", f"{speed.exposed_s:,.2g}", f"{speed.tokens_per_s:,.0f}"]
            rates.append(f"{speed.utilisation:.1%}")
        table.add_row(
            it.strategy,
            _KEPT.get(it.checkpointing, it.checkpointing),
            f"{plan.micro_batch} x {plan.accumulation}" if plan.accumulation > 1 else str(plan.micro_batch),
            f"{it.memory.total / _GIB:,.1f}" + ("" if it.fits else " doesn't fit"),
            *rates,
            "-" if usd is None else f"{usd:,.0f}",
            style=None if it.fits else "dim",
        )
    return table


def _scaling_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="over the number of nodes, each with its best", title_justify="left")
    columns = (
        "nodes",
        "devices",
        "strategy",
        "batch",
        "tokens/s",
        "per device",
        "MFU",
        "USD/10^9 tokens",
        "days",
        "USD",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 2 else "right", no_wrap=True)
    for nodes, candidates in sorted(report.found.items()):
        best = candidates[0] if candidates else None
        if best is None or not best.fits or best.speed is None:
            table.add_row(
                str(nodes), "", "nothing fits" if best is None or not best.fits else best.strategy, style="dim"
            )
            continue
        usd, days, money = best.usd_per_billion_tokens, report.days(best), report.usd(best)
        speed = best.speed
        table.add_row(
            str(nodes), str(best.machines.size), best.strategy, str(best.plan.micro_batch * best.plan.accumulation),
            f"{speed.tokens_per_s:,.0f}", f"{speed.tokens_per_s / best.machines.size:,.0f}", f"{speed.utilisation:.1%}",
            *("-" if value is None else f"{value:,.{digits}f}" for value, digits in ((usd, 0), (days, 1), (money, 0))),
        )  # fmt: skip
    return table


def _sensitivity_table(report: Report) -> Table:
    from rich.table import Table

    factors = report.factors
    assert factors is not None
    table = Table(title="tokens/s of the best, if a factor is a tenth lower", title_justify="left")
    for column in ("factor", "value", "tokens/s"):
        table.add_column(column, justify="left" if column == "factor" else "right")
    for name, change in sorted(report.sensitivity.items(), key=lambda entry: -abs(entry[1])):
        table.add_row(name, f"{getattr(factors, name):.3g}", f"{change:+.1%}")
    return table


def _memory_table(report: Report) -> Table:
    from rich.table import Table

    ranks = report.ranks
    table = Table(
        title=f"{report.spec.num_parameters:,} parameters on {ranks} {'rank' if ranks == 1 else 'ranks'}: "
        "predicted MiB per rank",
        title_justify="left",
    )
    parts = ("weights", "gradients", "moments", "gathered", "activations", "all")
    for column in ("strategy", *parts, "sent per step"):
        table.add_column(column, justify="left" if column == "strategy" else "right", no_wrap=column == "strategy")
    for name, (footprint, taken) in report.memory_only.items():
        sent = sum(each.payload_bytes * each.count for each in footprint.collectives)
        kept = (footprint.weights_bytes, footprint.gradients_bytes, footprint.moments_bytes)
        whole = sum(kept) + taken.gathered + taken.activations + taken.logits
        amounts = (*kept, taken.gathered, taken.activations + taken.logits, whole, sent)
        table.add_row(name, *(f"{amount / 2**20:,.1f}" for amount in amounts))
    return table


def write(report: Report, folder: Path) -> None:
    """`plan.json`, and `plan.png` where there are machines.

    Raises:
        ConfigError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(to_json(report), indent=1) + "\n")
        if report.found:
            from trainer.planner.picture import draw

            draw(report, folder / "plan.png")
    except OSError as error:
        raise ConfigError(f"plan: {folder} can't be written: {error.strerror}. Choose another (run.dir).") from error


def to_json(report: Report) -> dict[str, Any]:
    """Plain values: bytes, seconds and USD."""
    said: dict[str, Any] = {"num_parameters": report.spec.num_parameters, "refused": dict(report.refused)}
    if report.machines is None:
        rows = [
            {"strategy": name, "bytes_per_rank": _bytes_per_rank(footprint, taken)}
            for name, (footprint, taken) in report.memory_only.items()
        ]
        return {**said, "ranks": report.ranks, "candidates": rows}
    best = report.best
    return {
        **said,
        "cluster": asdict(report.machines) | {"sources": dict(report.machines.sources)},
        "factors": {name: getattr(report.factors, name) for name in report.factors.factors()} if report.factors else {},
        "notes": list(report.factors.notes) if report.factors else [],
        "tokens": report.tokens,
        "best": None if best is None else _row(report, best),
        "candidates": [_row(report, each) for found in report.found.values() for each in found],
        "sensitivity": report.sensitivity,
        "advice": report.advice,
    }


def _bytes_per_rank(footprint: Footprint, taken: Memory) -> dict[str, int]:
    return {
        "weights": footprint.weights_bytes,
        "gradients": footprint.gradients_bytes,
        "moments": footprint.moments_bytes,
        "buffers": taken.gathered,
        "activations": taken.activations + taken.logits,
        "total": footprint.weights_bytes + footprint.gradients_bytes + footprint.moments_bytes + taken.gathered
        + taken.activations + taken.logits,
    }  # fmt: skip


def _row(report: Report, it: Candidate) -> dict[str, Any]:
    speed: Mapping[str, Any] = {}
    if it.speed is not None:
        speed = {
            "step_s": it.speed.step_s, "compute_s": it.speed.compute_s, "optimizer_s": it.speed.optimizer_s,
            "communication_s": it.speed.communication_s, "exposed_s": it.speed.exposed_s,
            "by_collective_s": dict(it.speed.by_collective), "tokens_per_s": it.speed.tokens_per_s,
            "tokens_per_s_per_device": it.speed.tokens_per_s / it.machines.size,
            "tflops_per_s_per_device": it.speed.flops_per_s / 1e12, "mfu": it.speed.utilisation,
        }  # fmt: skip
    return {
        "keys": words_of(it),
        "strategy": it.strategy,
        "nodes": it.machines.nodes,
        "devices": it.machines.size,
        "micro_batch": it.plan.micro_batch,
        "accumulation": it.plan.accumulation,
        "activation_checkpointing": it.checkpointing,
        "fits": it.fits,
        "why_not": it.why_not,
        "bytes_per_device": {**it.memory.parts(), "total": it.memory.total},
        "host_bytes": it.memory.host,
        "nvme_bytes": it.memory.nvme,
        "speed": speed or None,
        "usd_per_billion_tokens": it.usd_per_billion_tokens,
        "days": report.days(it),
        "usd": report.usd(it),
    }
