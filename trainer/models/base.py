"""What a model and its task are to the rest of the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from strategies.base import Batch, LossTerms, Weights
from trainer.data.base import Sample, Tokenizer


class Task(ABC):
    """From samples to a batch, and from a model's outputs to a loss summed over counted positions."""

    continues = False
    """Whether the model learns to predict the token after those that it is given."""

    @abstractmethod
    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        """Make one micro-batch; any randomness comes from `seeds` alone. Runs in data workers."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        """Token-summed loss, never averaged."""

    def metrics(self, outputs: Any, batch: Batch) -> dict[str, Any]:
        """Further (sum, weight) pairs for evaluation, such as accuracy."""
        return {}


@dataclass(kw_only=True)
class AbstractModel(ABC):
    """A model as its configuration says it; its fields are the `model` group."""

    @abstractmethod
    def prepare(self, tokenizer: Tokenizer | None) -> None:
        """Settle what depends on the data (vocabulary size), and refuse what doesn't fit it.

        Raises:
            ConfigError: the model can't be made, or doesn't fit the tokenizer.
        """

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Token numbers that it takes run from 0 to this, exclusive; known once it is prepared."""

    @property
    @abstractmethod
    def positions(self) -> int | None:
        """Most tokens of a sample; None: any number. Known once it is prepared."""

    @abstractmethod
    def make(self) -> nn.Module:
        """The module; called under the strategy's `init_context` with the seed already set."""

    @abstractmethod
    def weights(self, seed: int) -> Weights:
        """Where its first values come from."""

    @abstractmethod
    def task(self) -> Task:
        """What it is trained for."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write the model's own configuration (`config.json`) beside exported weights."""
