"""Turn a checkpoint, whatever strategy wrote it, into a folder that `transformers` opens."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpointer, Found, Record


def parser() -> Parser:
    """`shardwright export`'s own options."""
    found = Parser(
        "export",
        "Turn a checkpoint into a transformers folder: safetensors, configuration and tokenizer. "
        "LoRA adapters are merged into the weights beside which they were trained.",
    )
    found.add_argument(
        "source",
        help="a run's folder (its newest checkpoint), a checkpoint's folder, or an address such as s3://bucket/run",
    )
    found.add_argument("target", type=Path, help="the folder to write; must be new or empty")
    found.add_argument("--average", action="store_true", help="the running average of the weights (trainer.ema_decay)")
    return found


def main(options: Namespace) -> int:
    """Export the newest checkpoint of a run, or the one named."""
    step = export(options.source, options.target, average=options.average)
    print(f"written: {options.target} (step {step})")
    return 0


def export(source: str | Path, target: Path, *, average: bool = False) -> int:
    """Write `target` from `source`, in this process alone; the checkpoint's step.

    Raises:
        ConfigError: there is no checkpoint, no average in it, no model configuration, or `target` holds files.
    """
    from strategies.errors import ConfigError

    _refuse_used(target)
    found, keeper = _find(source)
    record = keeper.read_record(found)
    if average and not record.average:
        raise ConfigError(
            f"export: {found.address} holds no running average. Train with trainer.ema_decay, or drop --average."
        )
    try:
        _write(found, keeper, record, target, "average" if average else "weights")
    except OSError as error:
        raise ConfigError(f"export: {target} can't be written: {error.strerror or error}. Choose another.") from error
    return int(record.progress["step"])


def _find(source: str | Path) -> tuple[Found, Checkpointer]:
    import torch

    from strategies.errors import ConfigError
    from strategies.world import Launch, World, open_store
    from trainer.checkpoint import Checkpointer, Checkpoints
    from trainer.checkpoint.catalogue import place_of

    world = World(device=torch.device("cpu"), store=open_store(Launch()))
    address, step = place_of(source)
    keeper = Checkpointer(address, world, Checkpoints(), write=False)
    found = keeper.newest() if step is None else keeper.at(step)
    if found is None:
        raise ConfigError(f"export: {source} holds no complete checkpoint. Name a run's folder or a checkpoint's.")
    return found, keeper


def _refuse_used(target: Path) -> None:
    from strategies.errors import ConfigError

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"export: {target} is there already. Choose a new folder, so that nothing is overwritten.")


def _write(found: Found, keeper: Checkpointer, record: Record, target: Path, kind: str) -> None:
    from trainer.commands.parts import tokenizer_of
    from trainer.models.library import quiet

    tokenizer = tokenizer_of(record.config.get("data"))
    if tokenizer is None:
        _keep_vocabulary(record, keeper.shapes(found))
    trained = _model(record, tokenizer)
    module: Any = _filled(trained, found, keeper, record, kind)
    plain = trained if not trained.lora.rank else _model(record, tokenizer, lora={})
    target.mkdir(parents=True, exist_ok=True)
    with quiet():
        module.save_pretrained(target)  # knows which names are tied, and how to cut what is large
    plain.save_config(target)  # as it was before training changed it
    if tokenizer is not None:
        tokenizer.save(target)


def _model(record: Record, tokenizer: Any, **changes: Any) -> Any:
    """The model that the checkpoint's configuration describes."""
    from strategies.errors import ConfigError
    from trainer.config import restored
    from trainer.models import HFModel

    if not record.config.get("model"):
        raise ConfigError("export: this model was made by a Trainer subclass, which transformers doesn't know.")
    model = restored(HFModel, {**record.config["model"], **changes})
    model.prepare(tokenizer)
    return model


def _keep_vocabulary(record: Record, shapes: dict[str, tuple[int, ...]]) -> None:
    """Where a Trainer subclass brought the tokenizer, only the weights know how many tokens it had."""
    import torch

    from trainer.models.initialise import bare

    model = _model(record, None)
    with torch.device("meta"):
        module = bare(model.make())
    embedding = module.get_input_embeddings().weight
    name = next(name for name, value in module.named_parameters(remove_duplicate=False) if value is embedding)
    same = (key for key in shapes if key == f"weights/{name}" or key.endswith(f".{name}"))  # beside adapters: longer
    size = next((shapes[key][0] for key in same), 0)
    if size and "vocab_size" not in record.config["model"]["config"]:
        record.config["model"]["config"]["vocab_size"] = size


def _filled(model: Any, found: Found, keeper: Checkpointer, record: Record, kind: str) -> Any:
    """The module of `model` with the checkpoint's weights, adapters merged."""
    import torch

    from trainer.models.initialise import bare

    with torch.device("meta"):
        module = model.make()
    empty = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in module.state_dict().items()}
    stored = {name: value for name, value in empty.items() if name not in record.aliases}
    keeper.load(found, {f"{kind}/{name}": value for name, value in stored.items()})
    module.load_state_dict({name: stored[record.aliases.get(name, name)] for name in empty}, assign=True)
    bare(module).tie_weights()
    return module.merge_and_unload() if model.lora.rank else module
