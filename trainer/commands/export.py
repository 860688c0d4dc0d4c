"""Turn a checkpoint, whatever strategy wrote it, into a folder that `transformers` opens."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint import Checkpointer, Found, Record

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
    from strategies.errors import ConfigError

    _refuse_size(max_shard_size)
    _refuse_used(target)
    found, keeper = _find(source)
    record = keeper.read_record(found)
    if average and not record.average:
        raise ConfigError(
            f"export: {found.address} holds no running average. Train with trainer.ema_decay, or drop --average."
        )
    with _undone(target):
        _write(found, keeper, record, target, "average" if average else "weights", max_shard_size)
    return int(record.progress["step"])


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


def _write(found: Found, keeper: Checkpointer, record: Record, target: Path, kind: str, max_shard_size: str) -> None:
    import torch

    from trainer.commands.card import card
    from trainer.commands.parts import tokenizer_of
    from trainer.models.initialise import bare
    from trainer.models.library import quiet

    tokenizer = tokenizer_of(record.config.get("data"))
    if tokenizer is None:
        _keep_vocabulary(record, keeper.shapes(found))
    trained = _model(record, tokenizer)
    plain = trained if not trained.lora.rank else _model(record, tokenizer, lora={})
    with torch.device("meta"):
        module, source = bare(plain.make()), trained.make()
    # Transformers knows which names are tied, how others want experts stored, and how to cut what is large. Told that
    # the model lies on disk, it asks for each tensor when the file is due to which it belongs.
    module.hf_device_map = {"": "disk"}
    module._hf_hook = SimpleNamespace(weights_map=_Tensors(source, found, record.aliases, kind))
    target.mkdir(parents=True, exist_ok=True)
    with quiet():
        module.save_pretrained(target, max_shard_size=max_shard_size)
    plain.save_config(target)  # as it was before training changed it
    if tokenizer is not None:
        tokenizer.save(target)
    (target / "README.md").write_text(card(record, module, kind), encoding="utf-8")


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
    embedding = getattr(module.get_input_embeddings(), "weight", None)
    if embedding is None:  # it reads no tokens
        return
    name = next(name for name, value in module.named_parameters(remove_duplicate=False) if value is embedding)
    same = (key for key in shapes if key == f"weights/{name}" or key.endswith(f".{name}"))  # beside adapters: longer
    size = next((shapes[key][0] for key in same), 0)
    if size and "vocab_size" not in record.config["model"]["config"]:
        record.config["model"]["config"]["vocab_size"] = size


class _Tensors:
    """Names of the exported model -> tensors, each read from the checkpoint when it is asked for; adapters merged."""

    def __init__(self, source: Any, found: Found, aliases: Mapping[str, str], kind: str) -> None:
        from trainer.checkpoint.metadata import IndexReader
        from trainer.models.initialise import bare

        self._reader = IndexReader(found.store, f"{found.folder}/tensors")
        self._where, self._aliases, self._kind = found.address, aliases, kind
        self._shapes = source.state_dict()
        inner = bare(source)
        before = next(name for name, part in source.named_modules() if part is inner)
        self._names = {_plain(name, before): name for name in self._shapes}
        self._layers = {
            _plain(f"{path}.base_layer.weight", before): (path, layer)
            for path, layer in source.named_modules()
            if hasattr(layer, "get_delta_weight")
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            return self._read(self._names[name])
        path, layer = self._layers[name]
        layer = copy.deepcopy(layer)
        layer.load_state_dict({key: self._read(f"{path}.{key}") for key in layer.state_dict()}, assign=True)
        layer.merge()
        merged: Tensor = layer.get_base_layer().weight.detach()
        return merged

    def _read(self, name: str) -> Tensor:
        import torch

        from strategies.errors import ConfigError

        key = f"{self._kind}/{self._aliases.get(name, name)}"
        tensor = torch.empty(self._shapes[name].shape, dtype=self._shapes[name].dtype)
        try:
            self._reader.read({key: tensor})
        except Exception as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"export: {key} of {self._where} can't be read: {why}. Name another step.") from error
        return tensor


def _plain(name: str, before: str) -> str:
    """Without what `peft` adds to it."""
    return name.removeprefix(f"{before}.").replace(".base_layer.", ".")
