"""Predict the memory that a configuration takes on each rank, strategy by strategy, without training."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from strategies.base import Footprint, ModelSpec


def parser() -> Parser:
    """`shardwright plan`'s own options."""
    found = Parser(
        "plan",
        "Predict the memory that a configuration takes on each rank, for the strategy that is chosen, or for each one "
        "if none is. Trains nothing and needs none of the ranks. Writes plan.json into run.dir if that is given.",
    )
    found.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to predict for; default: 1")
    found.add_argument("keys", nargs="*", metavar="key=value", help="as for shardwright train")
    return found


def main(options: Namespace) -> int:
    """Takes the keys of `train`; prints a table and writes `plan.json` into run.dir where that is given."""
    from strategies.base import Plan, WorldSpec
    from strategies.errors import ConfigError
    from trainer.config import compose, made

    if options.ranks < 1:
        raise ConfigError(f"plan: --ranks={options.ranks} is below 1. Give a number of processes (--ranks).")
    config = compose(options.keys)
    spec, trainer = model_spec(config), made(config.trainer)
    micro_batch = trainer.micro_batch or 1
    plan = Plan(
        micro_batch=micro_batch,
        accumulation=max(1, trainer.global_batch // (micro_batch * options.ranks)),
        clip_norm=trainer.clip_norm,
        precision=made(config.precision),
        activation_checkpointing=trainer.recomputing,
    )
    world = WorldSpec(size=options.ranks, local_size=options.ranks)
    candidates, found = _candidates(options.keys), {}
    for name, keys in candidates.items():
        try:
            found[name] = made(compose(keys).strategy).footprint(spec, world, plan)
        except ConfigError:  # not with that many ranks
            if len(candidates) == 1:
                raise
    _show(spec, found, options.ranks)
    if config.run.dir is not None:
        _write(Path(config.run.dir), spec, found)
    return 0


def model_spec(config: Any) -> ModelSpec:
    """Count the parameters of the model that `config` describes, without storage for them.

    Raises:
        ConfigError: the model can't be made from its configuration.
    """
    import torch

    from strategies.base import ModelSpec
    from strategies.errors import ConfigError
    from trainer.commands.parts import tokenizer_of
    from trainer.config import made
    from trainer.models.base import AbstractModel

    model = made(config.model)
    if not isinstance(model, AbstractModel):
        raise ConfigError("plan: model=own is made by a Trainer subclass, which isn't here. Choose another (model).")
    model.prepare(tokenizer_of(config.data))
    with torch.device("meta"):
        module = model.make()
    return ModelSpec.of(module, slots_per_parameter=made(config.optimizer).slots_per_parameter)


def _candidates(keys: Sequence[str]) -> dict[str, list[str]]:
    """Strategy -> the keys that choose it: the one that was named, or whatever there is."""
    from trainer.config import strategy_names

    named = [key.partition("=")[2] for key in keys if key.startswith("strategy=")]
    if named or any(key.startswith("strategy.") for key in keys):
        return {named[-1] if named else "ddp": list(keys)}
    return {name: [*keys, f"strategy={name}"] for name in strategy_names()}


def _show(spec: ModelSpec, found: Mapping[str, Footprint], ranks: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{spec.num_parameters:,} parameters on {ranks} {'rank' if ranks == 1 else 'ranks'}: "
        "predicted MiB per rank, activations left out",
        title_justify="left",
    )
    for column in ("strategy", "weights", "gradients", "moments", "buffers", "all", "sent per step"):
        first = column == "strategy"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for name, it in found.items():
        sent = sum(collective.payload_bytes * collective.count for collective in it.collectives)
        amounts = (it.weights_bytes, it.gradients_bytes, it.moments_bytes, it.buffers_bytes, it.total_bytes, sent)
        table.add_row(name, *(f"{amount / 2**20:,.1f}" for amount in amounts))
    Console().print(table)


def _write(folder: Path, spec: ModelSpec, found: Mapping[str, Footprint]) -> None:
    from strategies.errors import ConfigError

    rows: list[dict[str, Any]] = [
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"num_parameters": spec.num_parameters, "candidates": rows}
        (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    except OSError as error:
        raise ConfigError(f"plan: {folder} can't be written: {error.strerror}. Choose another (run.dir).") from error
