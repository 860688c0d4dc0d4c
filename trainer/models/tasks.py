"""What a model is trained for: causal, masked and sequence-to-sequence language models, classification."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from strategies.base import Batch, LossTerms, Ratio
from strategies.errors import ConfigError
from trainer.data.base import Sample
from trainer.models.base import Task
from trainer.models.batching import (
    counts_of,
    documents_of,
    inputs_of,
    known_counts_of,
    positions_in,
    stack,
    target_table,
    width_of,
)
from trainer.models.chunked import TARGETS
from trainer.models.noise import corrupt_spans, mask_tokens, split_prefix
from trainer.models.packed import pair_mask

_LOG = logging.getLogger("shardwright.models")


class Apart(Enum):
    """How documents of one sample are kept out of each other's attention."""

    no = "no"
    """The model can't."""
    positions = "positions"
    """By positions that begin again at each document."""
    flat_positions = "flat_positions"
    """The same, for attention kernels that look for documents only in a batch of one row."""
    bool_mask = "bool_mask"
    """By a mask over pairs of positions, true where they see each other."""
    float_mask = "float_mask"
    """By the same mask as numbers to add to scores."""


@dataclass(kw_only=True)
class _TokenTask(Task):
    """What the language-model tasks share."""

    padding: int = 0
    """Token that fills short samples."""
    limit: int | None = None
    """Most positions that the model knows."""
    chunked: bool = False
    """The model's head makes the losses itself, a few positions at a time."""
    auxiliary_weight: float = 0.0
    """Of the mean-type loss that models with experts give beside their logits."""
    apart: Apart = Apart.no

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        """Cross-entropy summed over counted positions, in float32 or what is higher."""
        if self.chunked:
            # The head knows the labels of when the batch was made; this one may have become weightless.
            loss = torch.where(batch.labels != -100, outputs.logits[..., 0], 0.0).sum()
        else:
            loss = summed_cross_entropy(outputs.logits, batch.labels)
        balance = getattr(outputs, "aux_loss", None) if self.auxiliary_weight else None
        return LossTerms(loss=loss, auxiliary=None if balance is None else balance * self.auxiliary_weight)

    def metrics(self, outputs: Any, batch: Batch) -> dict[str, Ratio]:
        """How often the likeliest token is the right one."""
        counted = batch.labels != -100
        hits = outputs.logits[..., 1] > 0 if self.chunked else outputs.logits.argmax(dim=-1) == batch.labels
        return {"accuracy": ((hits & counted).sum().float(), counted.sum().float())}

    def _batch(self, inputs: dict[str, Any], labels: Tensor, num_tokens: int) -> Batch:
        if self.chunked:
            inputs[TARGETS] = labels
        return Batch(inputs=inputs, labels=labels, num_targets=_num_targets(labels), num_tokens=num_tokens)

    def _say_leak(self) -> None:
        if not getattr(self, "_said", False):
            self._said = True
            _LOG.warning(
                "this model can't keep the documents of a packed sample out of each other's attention; "
                "they see each other (data.packing)"
            )

    def _document_table(self, samples: list[Sample], lengths: Sequence[int], width: int) -> Tensor | None:
        """int64 [samples, width]: the document at each of the first `lengths` positions, padding being one more.

        None where no sample has several.
        """
        known = [documents_of(sample) for sample in samples]
        known = [None if row is None or _single(row[:n]) else row[:n] for row, n in zip(known, lengths, strict=True)]
        if all(row is None for row in known):
            return None
        whole = [np.zeros(n, dtype=np.int64) if row is None else row for row, n in zip(known, lengths, strict=True)]
        return stack(whole, width, max(int(row.max()) for row in whole) + 1)


@final
@dataclass(kw_only=True)
class CausalTask(_TokenTask):
    """Predict each token from those before it, of the same document where the model can."""

    continues = True

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        rows = [sample["tokens"][:-1] for sample in samples]
        lengths = [len(row) for row in rows]
        if min(lengths) < 1:
            raise ConfigError(
                "CausalTask: a sample has fewer than 2 tokens, so there is nothing to predict. Use longer ones (data)."
            )
        width = width_of(lengths, self.limit)
        counts = [None if (known := known_counts_of(sample)) is None else known[1:] for sample in samples]
        labels = target_table([sample["tokens"][1:] for sample in samples], counts, width)
        documents = self._document_table(samples, lengths, width)
        inputs = inputs_of(rows, width, self.padding)
        if documents is not None and self.apart is Apart.no:
            self._say_leak()
        elif documents is not None:
            # Padding is a document of its own, so no mask is needed; with one, positions aren't looked at.
            inputs.pop("attention_mask", None)
            inputs["position_ids"] = positions_in(documents)
            if self.apart is Apart.flat_positions:
                inputs = {name: value.view(1, -1) for name, value in inputs.items()}
                labels = labels.view(1, -1)
        return self._batch(inputs, labels, sum(lengths))


@final
@dataclass(kw_only=True)
class MaskedTask(_TokenTask):
    """Predict hidden tokens from those on both sides. Source: Devlin et al. 2019, section 3.1."""

    mask: int
    """Token that hides."""
    vocabulary_size: int
    share: float = 0.15
    """Of the tokens that are to be predicted."""
    never: tuple[int, ...] = ()
    """Tokens that are never hidden."""

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        hidden = [
            mask_tokens(
                sample["tokens"],
                counts_of(sample) & ~np.isin(sample["tokens"], self.never),
                seed,
                share=self.share,
                mask=self.mask,
                vocabulary_size=self.vocabulary_size,
            )
            for sample, seed in zip(samples, seeds, strict=True)
        ]
        rows = [read for read, _ in hidden]
        lengths = [len(row) for row in rows]
        width = width_of(lengths, self.limit)
        labels = target_table([sample["tokens"] for sample in samples], [targets for _, targets in hidden], width)
        inputs = inputs_of(rows, width, self.padding)
        documents = self._document_table(samples, lengths, width)
        if documents is not None and self.apart in (Apart.bool_mask, Apart.float_mask):
            inputs["attention_mask"] = pair_mask(documents, additive=self.apart is Apart.float_mask)
        elif documents is not None:
            self._say_leak()
        return self._batch(inputs, labels, sum(lengths))


@final
@dataclass(kw_only=True)
class Seq2SeqTask(_TokenTask):
    """An encoder reads, a decoder answers.

    Samples with `source_tokens` bring both. Of the others, spans are hidden and asked for where the
    vocabulary has sentinels; else the second part is asked for, given the first.
    """

    start: int
    """Token that the decoder begins with."""
    sentinels: tuple[int, ...] = ()
    """Tokens that stand for the first, second... hidden span."""
    share: float = 0.15
    """Of the tokens that are hidden."""
    mean_span: float = 3.0
    """Mean length of a hidden span, in tokens."""

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        pairs = [self._pair(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]
        sources, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        lengths, answer_lengths = [len(row) for row in sources], [len(row) for row in answers]
        inputs = inputs_of(sources, width_of(lengths, self.limit), self.padding)
        width = width_of(answer_lengths, self.limit)
        begun = [np.concatenate([[self.start], row[:-1]]) for row in answers]
        # Padding lies behind: a causal decoder doesn't look there, so it needs no mask.
        inputs["decoder_input_ids"] = stack(begun, width, self.padding)
        if any(documents_of(sample) is not None for sample in samples):
            self._say_leak()
        labels = target_table(answers, [pair[2] for pair in pairs], width)
        return self._batch(inputs, labels, sum(lengths) + sum(answer_lengths))

    def _pair(self, sample: Sample, seed: int) -> tuple[Any, Any, Any]:
        tokens, counts = sample["tokens"], counts_of(sample)
        if sample.get("source_tokens") is not None:
            return sample["source_tokens"], tokens, counts
        if len(tokens) < 2:
            raise ConfigError("Seq2SeqTask: a sample has fewer than 2 tokens. Use longer ones (data).")
        if len(self.sentinels) < 2:
            return split_prefix(tokens, counts, seed)
        return corrupt_spans(tokens, counts, seed, share=self.share, mean_span=self.mean_span, sentinels=self.sentinels)


@dataclass(kw_only=True)
class AbstractClassificationTask(Task):
    """The class of a whole sample."""

    num_labels: int

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        return LossTerms(loss=summed_cross_entropy(outputs.logits, batch.labels))

    def metrics(self, outputs: Any, batch: Batch) -> dict[str, Ratio]:
        """How often the likeliest class is the right one."""
        counted = batch.labels != -100
        hits = (outputs.logits.argmax(dim=-1) == batch.labels) & counted
        return {"accuracy": (hits.sum().float(), counted.sum().float())}

    def labels_of(self, samples: list[Sample]) -> Tensor:
        """int64 [samples].

        Raises:
            ConfigError: a sample has no class, or one that the model doesn't know.
        """
        for sample in samples:
            if sample.get("label") is None or not 0 <= int(sample["label"]) < self.num_labels:
                raise ConfigError(
                    f"{type(self).__name__}: a sample has label {sample.get('label')}, and the model knows "
                    f"{self.num_labels} classes. Use data with labels, or more of them (data, model.num_labels)."
                )
        return torch.tensor([int(sample["label"]) for sample in samples], dtype=torch.int64)


@final
@dataclass(kw_only=True)
class ClassificationTask(AbstractClassificationTask):
    """The class of a text."""

    padding: int = 0
    """Token that fills short samples."""
    limit: int | None = None
    """Most positions that the model knows."""

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        rows = [sample["tokens"] for sample in samples]
        lengths = [len(row) for row in rows]
        return Batch(
            labels=self.labels_of(samples),
            inputs=inputs_of(rows, width_of(lengths, self.limit), self.padding),
            num_targets=len(rows),
            num_tokens=sum(lengths),
        )


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the counted positions, in float32 or what is higher.

    Args:
        logits: [..., classes].
        labels: int64 [...]; -100 where a position doesn't count.

    Returns:
        0-d; 0 with a graph where nothing counts.
    """
    if logits.dtype.itemsize < torch.float32.itemsize:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100)


def _num_targets(labels: Tensor) -> int:
    return int(np.count_nonzero(labels.numpy() != -100))  # torch takes three times as long for so few


def _single(row: Any) -> bool:
    return bool((row == row[0]).all())
