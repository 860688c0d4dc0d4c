"""Small things around `transformers` and `peft`: silence, one-line errors, what is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from strategies.errors import ConfigError, nearest
from trainer.data.base import Tokenizer

_MAX_SENTINELS = 100
_MAX_LAYERS = 10_000
_SIZE = re.compile(r"^(d_\w+|n_(embd|layer|head|positions)|num_\w*(layers|heads)|(hidden|intermediate|vocab)_size)$")


def check_flash() -> None:
    why = None
    if not torch.cuda.is_available():
        why = "needs a CUDA device"
    elif importlib.util.find_spec("flash_attn") is None:
        why = "needs the package flash-attn, which is not installed"
    if why is not None:
        raise ConfigError(f"HFModel: attention=flash_attention_2 {why}. Use sdpa or auto (model.attention).")


def check_fields(kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse fields that a configuration class of `transformers` doesn't have, and sizes and shares that can't be."""
    known = config_fields(kind)
    for name, value in given.items():
        key = f"model.config.{name}"
        if name not in known:
            raise ConfigError(f"HFModel: {kind.__name__} has no field {name!r}. {nearest(name, known)} ({key})")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and _SIZE.search(name) and value < 1:
            raise ConfigError(f"HFModel: {name}={value} is below 1. Give a size ({key}).")
        if number and name.endswith("layers") and value > _MAX_LAYERS:
            raise ConfigError(f"HFModel: {name}={value} is more than {_MAX_LAYERS}. Give fewer layers ({key}).")
        if number and name.endswith(("dropout", "pdrop", "dropout_rate", "dropout_prob")) and not 0 <= value < 1:
            raise ConfigError(f"HFModel: {name}={value} is not in [0, 1). Try 0.1 ({key}).")


def config_fields(kind: Any) -> set[str]:
    """The names that a configuration class of `transformers` knows; such classes are dataclasses from 5.4 on."""
    if dataclasses.is_dataclass(kind):
        known = {item.name for item in dataclasses.fields(kind)}
    else:
        known = set(kind().to_dict())
    special = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "tie_word_embeddings"}
    return known | special | set(kind.attribute_map)


def sentinels(tokenizer: Tokenizer | None, vocabulary_size: int) -> tuple[int, ...]:
    """T5's own tokens for hidden spans; else what the vocabulary has to spare at its end."""
    if tokenizer is None:
        return ()
    found: list[int] = []
    while len(found) < _MAX_SENTINELS:
        token = tokenizer.encode(f"<extra_id_{len(found)}>")
        if len(token) != 1 or token[0] in found:
            break
        found.append(token[0])
    last = vocabulary_size - 1
    return tuple(found or range(last, max(last - _MAX_SENTINELS, tokenizer.vocabulary_size - 1), -1))


def first_number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return default


def known_positions(model: Any) -> int | None:
    """How many positions a model of `transformers` knows; None: any number.

    Raises:
        ConfigError: none is left for tokens.
    """
    config = model.config.get_text_config()
    limit = asked = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token's number.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= module.padding_idx + 1
    if limit < 1:
        raise ConfigError(
            f"HFModel: no position is left of max_position_embeddings={asked}, since {config.model_type} counts from "
            "behind the padding token's number. Raise it (model.config.max_position_embeddings)."
        )
    return int(limit)


def line(error: BaseException, *, last: bool = False) -> str:
    """The first sentence of an error, without its stop; strict dataclasses say what matters in their last line."""
    said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [text.strip() for text in said.splitlines() if text.strip()] or [type(error).__name__]
    return lines[-1].rstrip(".") if last else re.split(r"\.(?:\s|$)", lines[0], maxsplit=1)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars of transformers; its errors come as exceptions."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
