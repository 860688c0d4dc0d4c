"""What a model is trained for: the class of `transformers` that is made for it, and its task."""

from __future__ import annotations

from enum import Enum
from typing import Any

from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.models.base import Task
from trainer.models.images import ImageTask, Pixels
from trainer.models.library import first_number, sentinels
from trainer.models.tasks import Apart, CausalTask, ClassificationTask, MaskedTask, Seq2SeqTask


class Objective(Enum):
    """What the model is trained for."""

    causal = "causal"
    masked = "masked"
    seq2seq = "seq2seq"
    classification = "classification"
    image_classification = "image_classification"

    @property
    def classifies(self) -> bool:
        """Whether it gives one class for a whole sample."""
        return self in (Objective.classification, Objective.image_classification)

    @property
    def reads_images(self) -> bool:
        """Whether it takes pixels instead of tokens."""
        return self is Objective.image_classification


_AUTO_CLASSES = {
    Objective.causal: "AutoModelForCausalLM",
    Objective.masked: "AutoModelForMaskedLM",
    Objective.seq2seq: "AutoModelForSeq2SeqLM",
    Objective.classification: "AutoModelForSequenceClassification",
    Objective.image_classification: "AutoModelForImageClassification",
}


def auto_class(objective: Objective) -> Any:
    """The class of `transformers` that makes models for it."""
    import transformers

    return getattr(transformers, _AUTO_CLASSES[objective])


def make_task(
    objective: Objective,
    config: Any,
    tokenizer: Tokenizer | None,
    *,
    limit: int | None,
    apart: Apart,
    num_labels: int | None,
    noise: float,
    chunked: bool,
    pixels: Pixels | None,
) -> Task:
    """The task of a model.

    Args:
        objective: what it is trained for.
        config: of `transformers`, with nothing left open.
        tokenizer: of the data, if it has one.
        limit: most positions that the model knows.
        apart: how it keeps documents of one sample apart.
        num_labels: classes; for classification.
        noise: share of tokens hidden.
        chunked: the model's head makes the losses itself.
        pixels: what images are to be; for images.

    Raises:
        ConfigError: the tokenizer has no token that hides.
    """
    padding = tokenizer.padding if tokenizer is not None else first_number(config, "pad_token_id", default=0)
    if objective.classifies:
        assert num_labels is not None
        if pixels is not None:
            return ImageTask(num_labels=num_labels, pixels=pixels)
        return ClassificationTask(num_labels=num_labels, padding=padding, limit=limit)
    shared: dict[str, Any] = {
        "padding": padding,
        "limit": limit,
        "chunked": chunked,
        "auxiliary_weight": float(getattr(config, "router_aux_loss_coef", None) or 0.0),
        "apart": apart,
    }
    if objective is Objective.causal:
        return CausalTask(**shared)
    if objective is Objective.masked:
        return _masked_task(tokenizer, noise, shared)
    return Seq2SeqTask(
        start=first_number(config, "decoder_start_token_id", "pad_token_id", default=padding),
        sentinels=sentinels(tokenizer, config.get_text_config().vocab_size),
        share=noise,
        **shared,
    )


def _masked_task(tokenizer: Tokenizer | None, noise: float, shared: dict[str, Any]) -> Task:
    if tokenizer is None or tokenizer.mask is None:
        raise ConfigError(
            "HFModel: objective=masked needs a tokenizer with a mask token, and there is none. "
            "Use another tokenizer or another objective (data.tokenizer, model.objective)."
        )
    return MaskedTask(
        mask=tokenizer.mask,
        vocabulary_size=tokenizer.vocabulary_size,
        share=noise,
        never=(tokenizer.boundary, tokenizer.padding),
        **shared,
    )
