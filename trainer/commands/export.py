"""Turn a checkpoint, whatever strategy wrote it, into a folder that `transformers` opens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError
from strategies.world import World, open_store
from trainer.checkpoint import Checkpointer, Checkpoints, Record


def main(words: Sequence[str]) -> int:
    """Export the newest checkpoint of a run, or the one named."""
    parser = argparse.ArgumentParser(
        prog="shardwright export",
        description="Turn a checkpoint into a transformers folder: safetensors, configuration and tokenizer.",
    )
    parser.add_argument("source", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint's folder")
    parser.add_argument("target", type=Path, help="the folder to write; must be new or empty")
    parser.add_argument("--average", action="store_true", help="the running average of the weights (trainer.ema_decay)")
    options = parser.parse_args(list(words))
    export(options.source, options.target, average=options.average)
    print(f"written: {options.target}")
    return 0


def export(source: Path, target: Path, *, average: bool = False) -> None:
    """Write `target` from `source`, in this process alone.

    Raises:
        ConfigError: there is no checkpoint, no average in it, no model configuration, or `target` holds files.
    """
    from huggingface_hub import save_torch_state_dict

    path, keeper = _find(source)
    record = keeper.read_record(path)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"export: {target} is not empty. Choose a new folder, so that nothing is overwritten.")
    if average and not record.average:
        raise ConfigError(f"export: {path} holds no running average. Train with trainer.ema_decay, or drop --average.")
    model, tokenizer = _made_from(record)
    module = _without_storage(model)
    weights = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in module.state_dict().items()}
    stored = {name: weights[record.aliases.get(name, name)] for name in weights if name not in record.aliases}
    prefix = "average" if average else "weights"
    keeper.load(path, {f"{prefix}/{name}": value for name, value in stored.items()})
    target.mkdir(parents=True, exist_ok=True)
    complete: dict[str, Tensor] = {name: stored[record.aliases.get(name, name)] for name in weights}
    save_torch_state_dict(complete, target, metadata={"format": "pt"})
    model.save_config(target)
    if tokenizer is not None:
        tokenizer.save(target)


def _find(source: Path) -> tuple[Path, Checkpointer]:
    from strategies.world import Launch

    world = World(device=torch.device("cpu"), store=open_store(Launch()))
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source.parent
    keeper = Checkpointer(folder, world, Checkpoints())
    path = keeper.newest() if folder.name == "checkpoints" and folder.parent == source else source
    if path is None:
        raise ConfigError(f"export: {source} holds no complete checkpoint. Name a run's folder or a checkpoint's.")
    return path, keeper


def _made_from(record: Record) -> tuple[Any, Any]:
    """The model and the tokenizer that the checkpoint's configuration describes."""
    from trainer.config import restored
    from trainer.data import make_tokenizer
    from trainer.models import HFModel

    if not record.config.get("model"):
        raise ConfigError("export: this model was made by a Trainer subclass, which transformers doesn't know.")
    model = restored(HFModel, record.config["model"])
    name = (record.config.get("data") or {}).get("tokenizer")
    tokenizer = make_tokenizer(name) if name else None
    model.prepare(tokenizer)
    return model, tokenizer


def _without_storage(model: Any) -> torch.nn.Module:
    with torch.device("meta"):
        module: torch.nn.Module = model.make()
    return module
