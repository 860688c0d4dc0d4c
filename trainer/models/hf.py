"""Any model of `transformers`: pretrained, or from a configuration with fresh weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from strategies.base import Weights
from strategies.errors import ConfigError, nearest
from trainer.data.base import Tokenizer
from trainer.first_import import first_import_of
from trainer.models import pretrained
from trainer.models.base import AbstractModel, Task
from trainer.models.chunked import use_chunked_head
from trainer.models.dispatch import empty
from trainer.models.images import Pixels
from trainer.models.initialise import bare, initialise, initialise_adapters
from trainer.models.library import (
    check_fields,
    check_flash,
    known_positions,
    line,
    quiet,
)
from trainer.models.lora import LoRA, adapted, adapter_config
from trainer.models.objectives import Objective, auto_class, make_task
from trainer.models.packed import follows_positions, takes_pair_mask, without_search
from trainer.models.tasks import Apart


class Attention(Enum):
    """Which implementation of attention the model uses."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


@final
@dataclass(kw_only=True)
class HFModel(AbstractModel):
    """A model of `transformers`. Code that comes with a model is never run.

    Either `path` (with its weights) or `architecture` (fresh weights) says which.
    """

    path: str | None = None
    """A folder with `config.json` and weights, or a name on the hub."""
    architecture: str | None = None
    """A model type of transformers, such as llama, t5, gpt2, bert, vit; fresh weights, no network."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's own configuration, dropout among them; what isn't named has its default."""
    objective: Objective = Objective.causal
    """causal: next token; masked: hidden tokens; seq2seq: an answer to what was read; classification: of texts;
    image_classification."""
    num_labels: int | None = None
    """Classes; for classification only."""
    attention: Attention = Attention.auto
    """Implementation of attention; auto: what transformers prefers."""
    loss_chunk: int = 0
    """Positions whose logits exist at a time, for large vocabularies; 0: all at once."""
    noise: float = 0.15
    """Share of tokens hidden; for masked and seq2seq without a source."""
    lora: LoRA = field(default_factory=LoRA)
    """Train adapters and freeze the rest, if its rank isn't 0."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            both = f"path={self.path} and architecture={self.architecture} were both given"
            raise ConfigError(
                f"HFModel: {'neither path nor architecture says which model' if self.path is None else both}. "
                "Give one of them: model.path=<folder or hub name>, or model.architecture=llama (model.path)."
            )
        if not 0 <= self.loss_chunk < 1 << 40:
            raise ConfigError(
                f"HFModel: loss_chunk={self.loss_chunk} is out of range. Try 1024, or 0 for off (model.loss_chunk)."
            )
        if not 0 < self.noise < 1:
            raise ConfigError(f"HFModel: noise={self.noise} is not between 0 and 1. Try 0.15 (model.noise).")
        if self.noise != HFModel.noise and self.objective not in (Objective.masked, Objective.seq2seq):
            raise ConfigError(
                f"HFModel: noise={self.noise} means nothing for objective={self.objective.name}. "
                "Leave it out, or use objective=masked or seq2seq (model.noise)."
            )
        self._check_classification()
        if self.attention is Attention.flash_attention_2:
            check_flash()
        self._settled: Any = None
        self._tokenizer: Tokenizer | None = None
        self._apart = Apart.no
        self._limit: int | None = None

    def _check_classification(self) -> None:
        classifies = self.objective.classifies
        if classifies and (self.num_labels is None or self.num_labels < 2):
            raise ConfigError(
                f"HFModel: objective={self.objective.name} with num_labels={self.num_labels}. "
                "Say how many classes there are, 2 or more (model.num_labels)."
            )
        if not classifies and self.num_labels is not None:
            raise ConfigError(
                f"HFModel: num_labels={self.num_labels} means nothing for objective={self.objective.name}. "
                "Leave it out, or use objective=classification (model.num_labels)."
            )
        if classifies and self.loss_chunk:
            raise ConfigError(
                f"HFModel: loss_chunk={self.loss_chunk} is for language models, not for classification. "
                "Set it to 0 (model.loss_chunk)."
            )

    def prepare(self, tokenizer: Tokenizer | None) -> None:
        with quiet(), first_import_of("transformers.modeling_utils"):
            config = self._read_config()
            if type(config) not in auto_class(self.objective)._model_mapping:
                raise ConfigError(
                    f"HFModel: {config.model_type} has no model for objective={self.objective.name}. "
                    "Choose another objective or another model (model.objective)."
                )
            self._fit_vocabulary(config, tokenizer)
            self._tokenizer = tokenizer
            self._settle(config, tokenizer)
            with torch.device("meta"):
                self._inspect(self._build())

    @property
    def vocabulary_size(self) -> int:
        return int(getattr(self._settled.get_text_config(), "vocab_size", 0))

    @property
    def positions(self) -> int | None:
        return self._limit

    def make(self) -> nn.Module:
        assert self._settled is not None, "prepare() comes first"
        seed = torch.initial_seed()
        with quiet():
            model: nn.Module
            if torch.get_default_device().type == "meta":
                model = self._build()
                return model
            if self.path is None:
                model = self._build()
                initialise(model, seed)
                return model
            model = self._dress(self._load())
            initialise_adapters(model, seed)
            return model

    def empty(self) -> nn.Module:
        """The module without storage for its parameters, to be filled and dispatched by Accelerate.

        Unlike on the meta device, buffers that aren't stored, such as rotary frequencies, have their values.
        """
        assert self._settled is not None, "prepare() comes first"
        return empty(self._build)

    def weights(self, seed: int) -> Weights:
        folder = None if self.path is None or not Path(self.path).is_dir() else Path(self.path)

        def fill(model: nn.Module) -> None:
            with quiet():
                if self.path is None:
                    initialise(model, seed)
                    return
                with self._refusing():
                    pretrained.fill(model, self.path, seed, lambda: self._dress(self._load()))

        return Weights(seed=seed, fill=fill, folder=folder)

    def task(self) -> Task:
        assert self._settled is not None, "prepare() comes first"
        return make_task(
            self.objective,
            self._settled,
            self._tokenizer,
            limit=self._limit,
            apart=self._apart,
            num_labels=self.num_labels,
            noise=self.noise,
            chunked=self.loss_chunk > 0,
            pixels=self._pixels(),
        )

    def save_config(self, folder: Path) -> None:
        assert self._settled is not None, "prepare() comes first"
        config = copy.deepcopy(self._settled)
        if hasattr(config, "use_cache"):
            config.use_cache = True  # off only while training
        made = auto_class(self.objective)._model_mapping[type(config)]
        config.architectures = [(made[0] if isinstance(made, list | tuple) else made).__name__]
        with quiet():
            config.save_pretrained(folder)
            if (pixels := self._pixels()) is not None:
                pixels.save(folder)
            if self.lora.rank:
                adapters = adapter_config(self.lora)
                adapters.base_model_name_or_path = self.path
                adapters.save_pretrained(folder)

    # The configuration of the model itself.

    def _read_config(self) -> Any:
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.path is None:
            assert self.architecture is not None
            if self.architecture not in CONFIG_MAPPING:
                raise ConfigError(
                    f"HFModel: architecture={self.architecture} is not a model type of transformers. "
                    f"{nearest(self.architecture, CONFIG_MAPPING)} (model.architecture)"
                )
            kind = CONFIG_MAPPING[self.architecture]
            check_fields(kind, self.config)
            return self._made_config(lambda: kind(**self.config))
        try:
            found = AutoConfig.from_pretrained(self.path, trust_remote_code=False, **self._local())
        except Exception as error:  # the hub, the file system and parsers each raise their own kinds
            raise ConfigError(
                f"HFModel: {self.path!r} can't be opened: {line(error)}. "
                "Give a folder with config.json, or a name on the hub (model.path)."
            ) from error
        check_fields(type(found), self.config)
        if not self.config:
            return found
        return self._made_config(lambda: type(found).from_dict({**found.to_dict(), **self.config}))

    def _made_config(self, make: Any) -> Any:
        try:
            return make()
        except Exception as error:  # strict dataclasses, and checks of each architecture
            raise ConfigError(
                f"HFModel: {line(error, last=True)}. Correct the model's configuration (model.config)."
            ) from error

    def _fit_vocabulary(self, config: Any, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None or self.objective is Objective.image_classification:
            return
        text, size = config.get_text_config(), tokenizer.vocabulary_size
        if self.path is None and "vocab_size" not in self.config:
            text.vocab_size = size
        elif text.vocab_size < size:
            fix = "Raise it (model.config.vocab_size)" if self.path is None else "Use the model's own (data.tokenizer)"
            raise ConfigError(
                f"HFModel: the tokenizer has {size} tokens and the model's vocabulary {text.vocab_size}. {fix}."
            )

    def _settle(self, config: Any, tokenizer: Tokenizer | None) -> None:
        """Take from the tokenizer what the user left open, and switch off what training doesn't use."""
        config.dtype = torch.float32
        if hasattr(config, "use_cache"):
            config.use_cache = False
        if self.num_labels is not None:
            config.num_labels = self.num_labels
        if getattr(config, "router_aux_loss_coef", None) and "output_router_logits" not in self.config:
            config.output_router_logits = True
        if tokenizer is not None:
            self._set_special_tokens(config, tokenizer)
        self._settled = config

    def _set_special_tokens(self, config: Any, tokenizer: Tokenizer) -> None:
        boundary, padding = tokenizer.boundary, tokenizer.padding
        known: dict[str, int | None] = {"bos_token_id": boundary, "eos_token_id": boundary, "pad_token_id": padding}
        if self.objective is Objective.seq2seq:
            known["decoder_start_token_id"] = padding
        for name, value in known.items():
            if name in self.config or (self.path is not None and getattr(config, name, None) is not None):
                continue
            if name == "pad_token_id" and padding == boundary and self.objective is not Objective.classification:
                value = None  # else the embedding of a real token would be frozen at zero
            setattr(config, name, value)

    # The module.

    def _build(self) -> Any:
        """The module without values of its own."""
        from transformers.initialization import no_init_weights

        config = copy.deepcopy(self._settled)
        with no_init_weights(), self._refusing():
            model = auto_class(self.objective).from_config(config, trust_remote_code=False, **self._implementation())
        model.tie_weights()
        return self._dress(model)

    def _load(self) -> Any:
        config = copy.deepcopy(self._settled)
        with self._refusing():
            return auto_class(self.objective).from_pretrained(
                self.path,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                **self._local(),
                **self._implementation(),
            )

    def _dress(self, model: Any) -> Any:
        """What goes around or into the model, its values apart."""
        if self.objective is not Objective.classification:
            # With it, some models look for padding in every batch, and wait for the device, only to warn.
            model.config.pad_token_id = None
        for name, part in model.named_modules():
            if name.endswith("contact_head"):  # ESM's, which no objective trains: it reads the attention's weights
                part.requires_grad_(False)
        if self.loss_chunk:
            use_chunked_head(model, self.loss_chunk)
        return without_search(adapted(model, self.lora) if self.lora.rank else model)

    def _inspect(self, model: Any) -> None:
        """Find out on the meta device what only the finished model knows."""
        inner = bare(model)
        implementation = inner.config._attn_implementation
        self._limit = known_positions(inner)
        if self.objective is Objective.causal and follows_positions(inner):
            flash = str(implementation).startswith("flash")
            self._apart = Apart.flat_positions if flash else Apart.positions
        elif self.objective is Objective.masked and takes_pair_mask(inner):
            self._apart = Apart.float_mask if implementation == "eager" else Apart.bool_mask

    def _implementation(self) -> dict[str, Any]:
        return {} if self.attention is Attention.auto else {"attn_implementation": self.attention.value}

    def _pixels(self) -> Pixels | None:
        if self.objective is not Objective.image_classification:
            return None
        return Pixels.of(self._settled, self.path, **self._local())

    def _local(self) -> dict[str, Any]:
        return {"local_files_only": True} if self.path is not None and Path(self.path).is_dir() else {}

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # each architecture, the hub and the file system raise their own kinds
            name = self.path or self.architecture
            raise ConfigError(
                f"HFModel: {name} can't be made: {line(error)}. Correct the model's settings (model)."
            ) from error
