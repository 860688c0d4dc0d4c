"""What the sources of text have in common: tokenise once, split, and cut into samples."""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from strategies.errors import ConfigError
from strategies.world import World
from trainer.data.base import AbstractData, Data, Samples, Say, Tokenizer
from trainer.data.cache import Cache, MakeReport, on_first_rank, reporter
from trainer.data.documents import Documents, DocumentWriter
from trainer.data.packing import DocumentSamples, PackedSamples, Packing, WindowSamples, plan_packing
from trainer.data.tokenizers import make_tokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024


class Document(NamedTuple):
    """One document as it was read."""

    pieces: Sequence[tuple[str, bool]]
    """Its text, in pieces that are tokenised apart, and whether each is a target."""
    validation: bool
    label: str | None = None
    """The name of its class."""
    source: str | None = None
    """What an encoder reads, with the document as the answer."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a source found, ready to be read."""

    key: Any
    """JSON value from which the documents follow."""
    documents: Callable[[], Iterator[Document]]
    """Raises ConfigError for whatever is wrong with a file."""
    what: str
    """For people, such as "212 files, 8.3 MB"."""
    total: int | None = None
    """Number of documents, if known."""


def in_validation(name: str, share: float) -> bool:
    """Whether the document called `name` belongs to the validation part; depends on nothing else."""
    word = int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest())
    return word < share * 2**64


@dataclass(kw_only=True)
class AbstractTokenStream(AbstractData):
    """Documents of tokens, cut into samples."""

    length: int = 256
    """Tokens in a sample that a model reads; the one more that is only a target isn't counted."""
    packing: Packing = Packing.windows
    """How documents become samples: `windows`, `whole` or `none`."""
    isolate_documents: bool = True
    """Tell the model which document each token is from, so that none attends to another."""
    validation: float = 0.05
    """Share of the documents that is held out, chosen by a hash, hence stable; 0: none."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"{self._name}: length={self.length} is below 1. Use 256 or so (data.length).")
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"{self._name}: validation={self.validation} is not a share. Use 0 up to below 1 (data.validation)."
            )
        if self.workers < 0:
            raise ConfigError(f"{self._name}: workers={self.workers} is negative. Use 0 or more (data.workers).")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _samples(self, documents: Documents, plan: Path | None, source_length: int | None = None) -> Samples:
        if self.packing is Packing.windows:
            return WindowSamples(documents, self.length, self.isolate_documents)
        if self.packing is Packing.whole:
            assert plan is not None
            return PackedSamples(documents, plan, self.isolate_documents)
        return DocumentSamples(documents, self.length, source_length or self.length)

    def _plan(self, cache: Cache, key: Any, documents: Documents) -> Path | None:
        """The cache's entry that says how documents are packed, if they need arranging."""
        if self.packing is not Packing.whole:
            return None
        return cache.entry("packing", [key, self.length], lambda to: plan_packing(documents, self.length, to))


@dataclass(kw_only=True)
class AbstractLanguageData(AbstractTokenStream):
    """Text in documents; a subclass says which."""

    tokenizer: str = "bytes"
    """`bytes`, a folder that holds a tokenizer of `transformers`, or its name on the hub."""

    @abstractmethod
    def _read(self, tokenizer: Tokenizer, folder: Path) -> Reading:
        """Find the files and read what decides the cache's key. On one rank per machine.

        Args:
            tokenizer: where the documents' text depends on it, as in chat templates.
            folder: for caches of libraries.

        Raises:
            ConfigError: something isn't there, or isn't what it should be.
        """

    @property
    def _source_length(self) -> int | None:
        """Tokens that an encoder reads; None: `length`."""
        return None

    def build(self, world: World, cache: Path, say: Say) -> Data:
        """See `AbstractData.build`."""
        found = on_first_rank(world, lambda: self._make(cache, say, reporter(world, say)))
        parts = {
            side: self._samples(Documents.open(cache / store), cache / plan if plan else None, self._source_length)
            for side, (store, plan) in found["parts"].items()
        }
        return Data(
            train=parts["train"],
            validation=parts.get("validation"),
            tokenizer=make_tokenizer(self.tokenizer),
            classes=found["classes"],
            description=found["description"],
        )

    def _make(self, folder: Path, say: Say, make_report: MakeReport) -> dict[str, Any]:
        """Fill the cache; say where everything lies in it."""
        tokenizer = make_tokenizer(self.tokenizer)
        cache = Cache(folder)
        reading = self._read(tokenizer, folder)
        key = [self._name, tokenizer.identity, reading.key, self.validation]

        def tokenise(target: Path) -> None:
            say(f"Tokenising {reading.what}")
            with make_report("Tokenising", reading.total) as report:
                summary = _write(reading.documents(), target, tokenizer, report.advance)
            (target / "summary.json").write_text(json.dumps(summary))

        entry = cache.entry("tokens", key, tokenise)
        summary = json.loads((entry / "summary.json").read_text())
        self._check(summary, reading.what)
        sides = [side for side in ("train", "validation") if summary[side]["documents"]]
        plans = {side: self._plan(cache, [key, side], Documents.open(entry / side)) for side in sides}
        counts = ", ".join(f"{summary[side]['tokens']:,} tokens to {_USES[side]}" for side in sides)
        return {
            "parts": {side: [f"{entry.name}/{side}", plan.name if plan else None] for side, plan in plans.items()},
            "classes": summary["classes"],
            "description": f"{reading.what}: {counts} ({self.tokenizer})",
        }

    def _check(self, summary: dict[str, Any], what: str) -> None:
        num_train, num_validation = summary["train"]["documents"], summary["validation"]["documents"]
        if not num_train + num_validation:
            raise ConfigError(f"{self._name}: there is no text in {what}. Give files that hold some (data).")
        if not num_train or (self.validation and not num_validation):
            raise ConfigError(
                f"{self._name}: validation={self.validation} splits {num_train + num_validation} documents into "
                f"{num_train} and {num_validation}, and neither part may be empty. "
                "Change the share, or use 0 for no validation (data.validation)."
            )


_USES = {"train": "train on", "validation": "validate on"}


def _write(
    documents: Iterator[Document], folder: Path, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Tokenise documents into `folder`/train and /validation, and summarise them."""
    size = tokenizer.vocabulary_size
    classes: dict[str, int] = {}
    with (
        DocumentWriter(folder / "train", tokenizer.boundary, size) as train,
        DocumentWriter(folder / "validation", tokenizer.boundary, size) as validation,
    ):
        for batch in _batches(documents):
            for document, tokens, source in _tokenised(batch, tokenizer):
                counts = None
                if not all(counted for _, counted in document.pieces):
                    flags = [counted for _, counted in document.pieces]
                    counts = np.repeat(flags, [len(part) for part in tokens])
                (validation if document.validation else train).add(
                    np.concatenate(tokens),
                    counts,
                    None if document.label is None else classes.setdefault(document.label, len(classes)),
                    None if source is None else np.append(source, tokenizer.boundary),
                )
            advance(len(batch))
        names = _class_names(classes)
        for writer in (train, validation):
            writer.renumber_labels([names.index(name) for name in classes])
    summary: dict[str, Any] = {
        name: {"documents": writer.num_documents, "tokens": writer.num_tokens}
        for name, writer in (("train", train), ("validation", validation))
    }
    return {**summary, "classes": names}


def _class_names(found: Iterable[str]) -> list[str]:
    """Class names in the order of their numbers: numbers stand for themselves, words go by the alphabet."""
    names = sorted(found)
    if names and all(name.isdecimal() for name in names):
        return [str(number) for number in range(max(map(int, names)) + 1)]
    return names


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(text) for text, _ in document.pieces)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenised(batch: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[Any], Any]]:
    """Each document, the tokens of its pieces, and those of its source; one call of the tokenizer for all."""
    texts = [text for document in batch for text, _ in document.pieces]
    sources = [document.source for document in batch if document.source is not None]
    found = iter(tokenizer.encode_many([*texts, *sources]))
    pieces = [list(itertools.islice(found, len(document.pieces))) for document in batch]
    for document, tokens in zip(batch, pieces, strict=True):
        yield document, tokens, None if document.source is None else next(found)
