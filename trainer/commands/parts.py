"""What several commands make from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data import Tokenizer


def tokenizer_of(data: Mapping[str, Any] | None) -> Tokenizer | None:
    """The tokenizer that the `data` group of a configuration names, without reading any data.

    Args:
        data: the group, as a dictionary; a mixture's sources have the same one, so the first says it.

    Returns:
        None: the data names none, as token numbers on disk or a Trainer subclass's own may do.

    Raises:
        ConfigError: it can't be loaded.
    """
    from trainer.data import make_tokenizer

    while data and data.get("sources"):
        data = next(iter(data["sources"].values()))
    name = data.get("tokenizer") if data else None
    return make_tokenizer(str(name)) if name else None
