"""What was predicted, for programs: everything that a plan found, `plan.json`, and the keys that train as planned."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies.base import Footprint, ModelSpec
from strategies.errors import ConfigError
from trainer.planner.agreement import Agreement
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency
from trainer.planner.memory import Memory
from trainer.planner.search import Candidate, WithoutMachines

_NOT_TRAINED = ("cluster", "run.dir")
"""Keys of a plan that say nothing of the training."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is to be trained on, and what is paid besides the steps."""

    tokens: float
    overhead: float = 0.0
    """Share of the time that saves and restarts take."""
    warm_up_h: float = 0.0
    """Hours that are paid before the first step, at each start."""
    starts: int = 1

    def days(self, tokens_per_s: float) -> float:
        """From the first start to the last step, without the time between starts."""
        return self.tokens / tokens_per_s / 86400 / (1 - self.overhead) + self.starts * self.warm_up_h / 24


@dataclass(kw_only=True)
class Report:
    """Everything that a plan found."""

    spec: ModelSpec
    keys: Sequence[str] = ()
    """As they were given."""
    tokens_per_sample: int = 0
    numbers: str = "fp32"
    """What is computed in."""
    budget: Budget | None = None
    ranks: int = 1
    """Without machines."""
    machines: Machines | None = None
    factors: Efficiency | None = None
    found: dict[int, list[Candidate]] = field(default_factory=dict)
    """Number of nodes -> candidates, best first."""
    memory_only: dict[str, WithoutMachines] = field(default_factory=dict)
    """Without machines: strategy -> what it takes, the least first."""
    refused: dict[int, dict[str, str]] = field(default_factory=dict)
    """Number of nodes -> what can't run on so many ranks -> why; without machines 0."""
    impossible: dict[str, str] = field(default_factory=dict)
    """What can't do the job on any number of ranks -> why."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    agreement: Agreement | None = None
    """Of the predicted collectives with those of a simulated step, if that was asked for."""

    @property
    def best(self) -> Candidate | None:
        """On the fewest nodes on which something fits."""
        fitting = (each[0] for _, each in sorted(self.found.items()) if each and each[0].fits)
        return next(fitting, None)

    @property
    def nodes(self) -> int:
        """The number of them whose candidates are shown: those of the best, or the most where nothing fits."""
        best = self.best
        return max(self.found) if best is None else best.machines.nodes

    def days(self, candidate: Candidate) -> float | None:
        """For all tokens; None: they or the speed aren't known."""
        if self.budget is None or candidate.speed is None:
            return None
        return self.budget.days(candidate.speed.tokens_per_s)

    def usd(self, candidate: Candidate) -> float | None:
        """For all tokens; None: the price isn't known either."""
        days, price = self.days(candidate), candidate.machines.price_per_h
        return None if days is None or price is None else days * 24 * price * candidate.machines.nodes


def in_turn(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Each strategy with its best settings, and then the other settings; both as they came, best first."""
    first = {id(each) for each in {it.name: it for it in reversed(candidates)}.values()}
    return [it for it in candidates if id(it) in first], [it for it in candidates if id(it) not in first]


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


def training_words(keys: Sequence[str], candidate: Candidate) -> list[str]:
    """All keys that `shardwright train` needs to do as a candidate does.

    Args:
        keys: those of the plan.
        candidate: of it.
    """
    chosen = words_of(candidate).split()
    decided = {word.partition("=")[0] for word in chosen}
    names = [key.partition("=")[0].lstrip("+~") for key in keys]
    kept = [
        key for key, name in zip(keys, names, strict=True)
        if name not in decided and not name.startswith("cluster.") and name not in _NOT_TRAINED
    ]  # fmt: skip
    return [*kept, *chosen]


def refuse_unwritable(folder: Path) -> None:
    """Before anything is computed that would be written there; nothing is made yet.

    Raises:
        ConfigError: it can't be written.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists() or each == each.parent)
    with _writing(folder):
        if not there.is_dir():
            raise NotADirectoryError(20, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")


def write(report: Report, folder: Path) -> None:
    """`plan.json` and `plan.png`.

    Raises:
        ConfigError: the folder can't be written.
    """
    from trainer.planner.picture import draw

    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".plan.json.new"
        unfinished.write_text(json.dumps(to_json(report), indent=1) + "\n")
        unfinished.replace(folder / "plan.json")
        draw(report, folder / "plan.png")


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"plan: {folder} can't be written: {error.strerror}. Choose another (run.dir).") from error


def to_json(report: Report) -> dict[str, Any]:
    """Plain values: bytes, seconds and USD."""
    said: dict[str, Any] = {
        "num_parameters": report.spec.num_parameters,
        "keys": list(report.keys),
        "precision": report.numbers,
        "tokens_per_sample": report.tokens_per_sample,
        "refused": dict(report.refused),
    }
    if report.machines is None:
        rows = [
            {"strategy": name, "bytes_per_rank": bytes_of(each.footprint, each.memory), "host_bytes": each.memory.host,
             "nvme_bytes": each.memory.nvme, "sent_bytes": each.sent_bytes}
            for name, each in report.memory_only.items()
        ]  # fmt: skip
        return {**said, "ranks": report.ranks, "candidates": rows, "simulation": _simulation(report)}
    best = report.best
    return {
        **said,
        "cluster": asdict(report.machines) | {"sources": dict(report.machines.sources)},
        "factors": {name: getattr(report.factors, name) for name in report.factors.factors()} if report.factors else {},
        "notes": list(report.factors.notes) if report.factors else [],
        "budget": None if report.budget is None else asdict(report.budget),
        "best": None if best is None else _row(report, best),
        "candidates": [_row(report, each) for found in report.found.values() for each in found],
        "sensitivity": report.sensitivity,
        "advice": report.advice,
        "simulation": _simulation(report),
    }


def _simulation(report: Report) -> dict[str, Any] | None:
    it = report.agreement
    if it is None:
        return None
    return {"strategy": it.strategy, "ranks": it.world.size, "micro_batches": it.micro_batches, "holds": it.holds,
            "predicted": [asdict(each) for each in it.predicted], "simulated": [asdict(each) for each in it.simulated],
            }  # fmt: skip


def bytes_of(footprint: Footprint, taken: Memory) -> dict[str, int]:
    """Of a rank: weights, gradients and moments, all of them and wherever they lie; and what its device holds at the
    highest moment of a step, of the other kinds and in all.
    """
    states = {
        "weights": footprint.weights_bytes,
        "gradients": footprint.gradients_bytes,
        "moments": footprint.moments_bytes,
    }
    return {**taken.parts(), **states, "total": taken.total}


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
    price = it.machines.price_per_h
    cut = [each.ranks for each in it.footprint.collectives if each.kind in ("all_gather", "reduce_scatter")]
    return {
        "keys": words_of(it),
        "strategy": it.strategy,
        "nodes": it.machines.nodes,
        "devices": it.machines.size,
        "mesh": {"replicate": it.machines.size // max(cut, default=1), "shard": max(cut, default=1)},
        "micro_batch": it.plan.micro_batch,
        "accumulation": it.plan.accumulation,
        "activation_checkpointing": it.checkpointing,
        "fits": it.fits,
        "why_not": it.why_not,
        "bytes_per_rank": bytes_of(it.footprint, it.memory),
        "host_bytes": it.memory.host,
        "nvme_bytes": it.memory.nvme,
        "speed": speed or None,
        "usd_per_h": None if price is None else price * it.machines.nodes,
        "usd_per_billion_tokens": it.usd_per_billion_tokens,
        "days": report.days(it),
        "usd": report.usd(it),
    }
