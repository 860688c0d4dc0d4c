"""Turn a checkpoint, whatever strategy wrote it, into a folder that `transformers` opens."""

from __future__ import annotations

import contextlib
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from trainer.commands import Parser

if TYPE_CHECKING:
    from trainer.commands.trained import Trained

_SHARD = "5GB"


def parser() -> Parser:
    """`shardwright export`'s own options."""
    found = Parser(
        "export",
        "Turn a checkpoint into a transformers folder: safetensors, configuration, tokenizer and model card. "
        "LoRA adapters are merged into the weights beside which they were trained. One process does it, and holds no "
        "more than one file of weights.",
    )
    found.add_argument(
        "source",
        help="a run's folder (its newest checkpoint), a checkpoint's folder, or an address such as s3://bucket/run",
    )
    found.add_argument("target", type=Path, help="the folder to write; must be new or empty")
    found.add_argument("--average", action="store_true", help="the running average of the weights (trainer.ema_decay)")
    found.add_argument(
        "--max-shard-size", metavar="SIZE", default=_SHARD, help=f"largest file of weights ({_SHARD}); such as 500MB"
    )
    return found


def main(options: Namespace) -> int:
    """Export the newest checkpoint of a run, or the one named."""
    from trainer.host_memory import give_back_freed_memory

    give_back_freed_memory()
    step = export(options.source, options.target, average=options.average, max_shard_size=options.max_shard_size)
    print(f"written: {options.target} (step {step})")
    return 0


def export(source: str | Path, target: Path, *, average: bool = False, max_shard_size: str = _SHARD) -> int:
    """Write `target` from `source`, in this process alone; the checkpoint's step.

    Args:
        source: a run's folder, a checkpoint's, or the address of one.
        target: new or empty; as it was if this fails.
        average: the running average instead of the weights.
        max_shard_size: of a file, as in `500MB`; a tensor that is larger has a file of its own. One such file is held
            in memory at a time.

    Raises:
        ConfigError: there is no checkpoint, no average in it, no model configuration, `target` holds files or can't
            be written, or the size isn't one.
    """

    from trainer.commands.trained import Trained

    _refuse_size(max_shard_size)
    _refuse_used(target)
    trained = Trained.open(source, average=average)
    with _undone(target):
        _write(trained, target, max_shard_size)
    return trained.step


@contextlib.contextmanager
def _undone(target: Path) -> Iterator[None]:
    """Where it can't be written, leave nothing; otherwise a second try would be refused."""
    from safetensors import SafetensorError

    from strategies.errors import ConfigError

    was_there = target.exists()
    try:
        yield
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if was_there:
            target.mkdir(exist_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        why = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ConfigError(f"export: {target} can't be written: {why}. Choose another.") from error


def _refuse_size(text: str) -> None:
    from strategies.errors import ConfigError

    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise ConfigError(f"export: {text!r} is not a size. Give one such as 500MB or 5GB (--max-shard-size).")


def _refuse_used(target: Path) -> None:
    from strategies.errors import ConfigError

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"export: {target} is there already. Choose a new folder, so that nothing is overwritten.")


def _write(trained: Trained, target: Path, max_shard_size: str) -> None:
    import torch

    from trainer.commands.card import card
    from trainer.models.initialise import bare
    from trainer.models.library import quiet

    tokenizer = trained.tokenizer()
    model = trained.model(tokenizer)
    plain = model if not model.lora.rank else trained.model(tokenizer, lora={})
    with torch.device("meta"):
        module = bare(plain.make())
    # Transformers knows which names are tied, how others want experts stored, and how to cut what is large. Told that
    # the model lies on disk, it asks for each tensor when the file is due to which it belongs.
    module.hf_device_map = {"": "disk"}
    module._hf_hook = SimpleNamespace(weights_map=trained.tensors(model))
    target.mkdir(parents=True, exist_ok=True)
    with quiet():
        module.save_pretrained(target, max_shard_size=max_shard_size)
    plain.save_config(target)  # as it was before training changed it
    if tokenizer is not None:
        tokenizer.save(target)
    (target / "README.md").write_text(card(trained.record, module, trained.kind), encoding="utf-8")
