"""Samples of unequal length side by side in tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.errors import ConfigError
from trainer.data.base import Sample, Tokens

_ROUND_TO = 8  # matrix units want multiples of 8


def width_of(lengths: Sequence[int], limit: int | None) -> int:
    """How wide a batch is: its longest row, rounded up where some row is padded anyway.

    Args:
        lengths: tokens of each row.
        limit: most positions that the model knows; None: any number.

    Raises:
        ConfigError: a row is longer than `limit`.
    """
    longest = max(lengths)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"Task: a sample has {longest} tokens, and the model knows {limit} positions. "
            "Use shorter samples, or more positions (data.length, model.config.max_position_embeddings)."
        )
    if min(lengths) == longest:
        return longest
    rounded = -(-longest // _ROUND_TO) * _ROUND_TO
    return rounded if limit is None else min(rounded, limit)


def stack(rows: Sequence[NDArray[Any]], width: int, padding: int) -> Tensor:
    """int64 [rows, width], padded on the right."""
    if all(len(row) == width for row in rows):
        return torch.from_numpy(np.array(rows, dtype=np.int64))
    table = np.full((len(rows), width), padding, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return torch.from_numpy(table)


def real(lengths: Sequence[int], width: int) -> Tensor:
    """int64 [rows, width]: 1 where a row has a token, 0 where it is padded."""
    return (torch.arange(width)[None, :] < torch.tensor(list(lengths))[:, None]).long()


def inputs_of(rows: Sequence[Tokens], width: int, padding: int) -> dict[str, Tensor]:
    """Keyword arguments of a forward: tokens, and an attention mask only where some row is padded.

    Without a mask, attention takes its fast path.
    """
    lengths = [len(row) for row in rows]
    inputs = {"input_ids": stack(rows, width, padding)}
    if min(lengths) < width:
        inputs["attention_mask"] = real(lengths, width)
    return inputs


def counts_of(sample: Sample) -> NDArray[np.bool_]:
    """Which of a sample's tokens are targets, bool [n]."""
    counts = known_counts_of(sample)
    return np.ones(len(sample["tokens"]), dtype=np.bool_) if counts is None else counts


def known_counts_of(sample: Sample) -> NDArray[np.bool_] | None:
    """The same; None where all are."""
    counts = sample.get("counts")
    return None if counts is None else np.asarray(counts, dtype=np.bool_)


def documents_of(sample: Sample) -> NDArray[np.int64] | None:
    """The document of each token, int64 [n]; None where there is only one."""
    documents = sample.get("documents")
    if documents is None or len(documents) == 0 or bool((documents == documents[0]).all()):
        return None
    return np.asarray(documents, dtype=np.int64)


def positions_in(documents: Tensor) -> Tensor:
    """Positions that begin again at 0 where the document changes.

    Args:
        documents: int64 [rows, width].

    Returns:
        int64 [rows, width].
    """
    index = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def target_table(rows: Sequence[Tokens], counts: Sequence[NDArray[np.bool_] | None], width: int) -> Tensor:
    """Labels int64 [rows, width]: tokens where they count, else -100; counts None: all do."""
    targets = [row if flag is None else np.where(flag, row, -100) for row, flag in zip(rows, counts, strict=True)]
    return stack(targets, width, -100)
