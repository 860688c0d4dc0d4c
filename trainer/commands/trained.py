"""A model as a checkpoint holds it: what it is, without storage, and its tensors one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.checkpoint import Checkpointer, Found, Record
    from trainer.data import Tokenizer
    from trainer.models import HFModel


class GoneError(ConfigError):
    """A run that goes on has removed the checkpoint, since it has newer ones."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A complete checkpoint, whatever strategy wrote it on whatever number of ranks; read by one process."""

    found: Found
    keeper: Checkpointer
    record: Record
    kind: str
    """`weights`, or `average` for the running average of them."""

    @classmethod
    def open(cls, source: str | Path, *, average: bool = False) -> Trained:
        """The newest checkpoint of a run, or the one named, verified.

        Args:
            source: a run's folder, a checkpoint's, or the address of one.
            average: the running average instead of the weights.

        Raises:
            ConfigError: there is no checkpoint, or no average in it.
        """
        import torch

        from strategies.world import World
        from trainer.checkpoint import Checkpointer, Checkpoints
        from trainer.checkpoint.catalogue import place_of

        world = World(device=torch.device("cpu"), store=torch.distributed.HashStore())
        address, step = place_of(source)
        keeper = Checkpointer(address, world, Checkpoints(), write=False)
        found = keeper.newest() if step is None else keeper.at(step)
        if found is None:
            raise ConfigError(
                f"Checkpoint: {source} holds no complete checkpoint. Name a run's folder or a checkpoint's."
            )
        record = keeper.read_record(found)
        if average and not record.average:
            raise ConfigError(
                f"Checkpoint: {found.address} holds no running average. Train with trainer.ema_decay, or drop "
                "--average."
            )
        return cls(found=found, keeper=keeper, record=record, kind="average" if average else "weights")

    @property
    def step(self) -> int:
        """Optimizer steps that it was trained for."""
        return int(self.record.progress["step"])

    def tokenizer(self, name: str | None = None) -> Tokenizer | None:
        """That of the run's data, if its configuration names one.

        Args:
            name: of another one, in its place.

        Raises:
            ConfigError: it can't be loaded.
        """
        from trainer.commands.parts import tokenizer_of
        from trainer.data import make_tokenizer

        tokenizer = make_tokenizer(name) if name else tokenizer_of(self.record.config.get("data"))
        if name or tokenizer is None:
            self._keep_vocabulary()
        return tokenizer

    def model(self, tokenizer: Tokenizer | None, **changes: Any) -> HFModel:
        """The model that the run's configuration describes, prepared.

        Args:
            tokenizer: that of `tokenizer()`.
            changes: other values for fields of its configuration.

        Raises:
            ConfigError: it isn't a model of transformers, or can't be made.
        """
        from trainer.config import restored
        from trainer.models import HFModel

        if not self.record.config.get("model"):
            raise ConfigError(
                "Checkpoint: this model was made by a Trainer subclass, which transformers doesn't know. "
                "Take a run whose model is one of transformers (model)."
            )
        # How attention is computed belongs to the machine, and flash attention to one with a GPU.
        model = restored(HFModel, {**self.record.config["model"], "attention": "auto", **changes})
        model.prepare(tokenizer)
        return model

    def tensors(self, trained: HFModel) -> Tensors:
        """Its tensors, as `model(tokenizer)` with its adapters names them."""
        import torch

        with torch.device("meta"):
            source = trained.make()
        return Tensors(source, self.found, self.record.aliases, self.kind)

    def _keep_vocabulary(self) -> None:
        """Where a Trainer subclass brought the tokenizer, only the weights know how many tokens it had."""
        import torch

        from trainer.models.initialise import bare

        model = self.model(None)
        with torch.device("meta"):
            module = bare(model.make())
        embedding = getattr(module.get_input_embeddings(), "weight", None)
        if embedding is None:  # it reads no tokens
            return
        shapes = self.keeper.shapes(self.found)
        name = next(name for name, value in module.named_parameters(remove_duplicate=False) if value is embedding)
        same = (
            key for key in shapes if key == f"weights/{name}" or key.endswith(f".{name}")
        )  # beside adapters: longer
        size = next((shapes[key][0] for key in same), 0)
        if size and "vocab_size" not in self.record.config["model"]["config"]:
            self.record.config["model"]["config"]["vocab_size"] = size


class Tensors:
    """Names of the model without adapters -> tensors, each read when it is asked for; adapters are merged."""

    def __init__(self, source: Any, found: Found, aliases: Mapping[str, str], kind: str) -> None:
        from trainer.checkpoint.metadata import IndexReader
        from trainer.models.initialise import bare

        self._reader = IndexReader(found.store, f"{found.folder}/tensors")
        self._found, self._aliases, self._kind = found, aliases, kind
        try:
            self._reader.read_metadata()  # now, since torch would log at length what is wrong with it
        except ConfigError as error:
            self._refuse_gone(error)
            raise
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

    def of(self, module: Any) -> Iterator[tuple[str, Tensor]]:
        """What a module without adapters stores, one after another; a tied weight comes once.

        Raises:
            ConfigError: something can't be read.
        """
        given: set[int] = set()
        for name, value in module.state_dict(keep_vars=True).items():
            if id(value) not in given:
                given.add(id(value))
                yield name, self[name]

    def _read(self, name: str) -> Tensor:
        import torch

        key = f"{self._kind}/{self._aliases.get(name, name)}"
        tensor = torch.empty(self._shapes[name].shape, dtype=self._shapes[name].dtype)
        try:
            self._reader.read({key: tensor})
        except Exception as error:
            self._refuse_gone(error)
            where, why = self._found.address, str(error).splitlines()[0]
            raise ConfigError(f"Checkpoint: {key} of {where} can't be read: {why}. Name another step.") from error
        return tensor

    def _refuse_gone(self, error: Exception) -> None:
        if not self._found.store.sizes(self._found.folder):
            raise GoneError(
                f"Checkpoint: {self._found.address} was removed while it was read, by its run, which keeps too few. "
                "Try again, or keep more of them (checkpoint.keep)."
            ) from error


def _plain(name: str, before: str) -> str:
    """Without what `peft` adds to it."""
    return name.removeprefix(f"{before}.").replace(".base_layer.", ".")
