"""Predict the memory that a configuration takes on each rank, strategy by strategy, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from strategies.base import Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import Launch


def main(words: Sequence[str]) -> int:
    """Takes the keys of `train`; prints a table and writes `plan.json` into run.dir where that is given."""
    from trainer.config import compose, made, registered_strategies

    if any(word in ("-h", "--help") for word in words):
        print("usage: shardwright plan [ranks=N] [key=value ...]\n\nThe keys are those of `shardwright train`; "
              "`ranks` is the number of processes to predict for.")  # fmt: skip
        return 0
    ranks = next((word.removeprefix("ranks=") for word in words if word.startswith("ranks=")), str(Launch().size))
    if not ranks.isdigit() or int(ranks) < 1:
        raise ConfigError(f"plan: ranks={ranks} is not a number of processes. Give 1 or more (ranks).")
    config = compose([word for word in words if not word.startswith("ranks=")])
    model, trainer = made(config.model), made(config.trainer)
    model.prepare(None)
    with torch.device("meta"):
        module = model.make()
    spec = ModelSpec(
        num_parameters=sum(value.numel() for value in module.parameters()),
        num_trainable=sum(value.numel() for value in module.parameters() if value.requires_grad),
    )
    plan = Plan(micro_batch=trainer.micro_batch or 1, precision=made(config.precision))
    world = WorldSpec(size=int(ranks), local_size=int(ranks))
    found = {cls.__name__: cls().footprint(spec, world, plan) for cls in registered_strategies()}
    _show(spec, found)
    if config.run.dir is not None:
        _write(Path(config.run.dir), spec, found)
    return 0


def _show(spec: ModelSpec, found: dict[str, Footprint]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{spec.num_parameters:,} parameters: predicted MiB per rank, activations left out")
    for column in ("strategy", "weights", "gradients", "moments", "buffers", "all", "sent per step"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name, it in found.items():
        sent = sum(collective.payload_bytes * collective.count for collective in it.collectives)
        amounts = (it.weights_bytes, it.gradients_bytes, it.moments_bytes, it.buffers_bytes, it.total_bytes, sent)
        table.add_row(name, *(f"{amount / 2**20:,.1f}" for amount in amounts))
    Console().print(table)


def _write(folder: Path, spec: ModelSpec, found: dict[str, Footprint]) -> None:
    rows = [
        {
            "strategy": name,
            "bytes_per_rank": {
                "weights": it.weights_bytes,
                "gradients": it.gradients_bytes,
                "moments": it.moments_bytes,
                "buffers": it.buffers_bytes,
                "total": it.total_bytes,
            },
        }
        for name, it in found.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"num_parameters": spec.num_parameters, "candidates": rows}, indent=1))
