"""What data is to the rest of the trainer: an indexable list of samples, split in two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from strategies.base import Batch
from strategies.world import World

Sample: TypeAlias = Any
"""What a source gives for an index. Sources of text give a dict of numpy arrays:

`tokens` int64 [n]; `counts` bool [n], optional: which tokens are targets (default all);
`documents` int32 [n], optional: the number of the document that each token is from, within the sample;
`label` int, optional: the class, for classification;
`source_tokens` int64 [m], optional: what an encoder reads, with `tokens` as the answer.

Sources of images give:

`pixels` uint8 [channels, height, width], no smaller than the model takes, which has the middle of it;
`label` int: the class;
`crop` bool, optional: the model may have any other part, drawn from the sample's seed;
`flip` bool, optional: it may be mirrored, drawn from the sample's seed.
"""

Collate: TypeAlias = Callable[[list[Sample], list[int]], Batch]
"""From samples, and for each a 63-bit number that is a pure function of (seed, epoch, index), to a batch."""

Tokens: TypeAlias = NDArray[np.int64]
"""Token numbers, [n]."""

Say: TypeAlias = Callable[[str], None]
"""Tells the person at the terminal one line (rank 0 only; silent elsewhere)."""


@runtime_checkable
class Samples(Protocol):
    """Anything with a length and an index, such as a torch Dataset; `[i]` is always the same sample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Tokenizer(ABC):
    """Text to token numbers and back."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Numbers run from 0 to this, exclusive."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Changes whenever the same text could give other numbers; part of the cache key."""

    @property
    @abstractmethod
    def boundary(self) -> int:
        """The token that starts a document, and so ends the one before."""

    @property
    @abstractmethod
    def padding(self) -> int:
        """Fills short samples; never counted."""

    @property
    @abstractmethod
    def mask(self) -> int | None:
        """Stands for a hidden token in masked language modelling; None: this tokenizer has none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Without boundary."""

    def encode_many(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text, as arrays; a subclass may have a faster way."""
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that this tokenizer brings for conversations, if it brings one."""
        return None

    def special_tokens(self) -> dict[str, str]:
        """What a chat template may refer to, such as `eos_token` -> `</s>`."""
        return {}

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Specials left out; invalid bytes replaced."""

    def save(self, folder: Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` opens, if this has such a form."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A job's samples."""

    train: Samples
    validation: Samples | None = None
    sources: Sequence[tuple[int, float]] = ()
    """For a mixture: (number of samples, weight) of each source, whose samples follow each other in
    `train`. Empty: one source."""
    tokenizer: Tokenizer | None = None
    largest_token: int | None = None
    """The largest token number, where no tokenizer bounds them and it is known."""
    classes: Sequence[str] = ()
    """For classification: the name of each class, in the order of their numbers."""
    description: str = ""
    """One line: what was read, how much, from where."""


@dataclass(kw_only=True)
class AbstractData(ABC):
    """A way to get samples; its fields are the `data` group of the configuration."""

    workers: int = 0
    """Processes per rank that prepare batches; 0: the training process itself. Order never depends on it."""

    @abstractmethod
    def build(self, world: World, cache: Path, say: Say) -> Data:
        """Read, tokenise (once, cached by content) and split. Called on every rank.

        Args:
            world: `world.first` lets one rank per machine do the slow part while the others wait.
            cache: folder for token caches, shared between runs.
            say: for progress and results.

        Raises:
            ConfigError: a path is missing, a file is damaged, a setting is out of range; on every rank.
        """
