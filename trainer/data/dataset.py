"""Rows of a table: JSON lines, Parquet, and whatever else `datasets` loads."""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.data.cache import file_digest
from trainer.data.language import AbstractLanguageData, Document, Reading, in_validation
from trainer.data.packing import Packing
from trainer.data.tokenizers import first_line
from trainer.place import at_home

_LOCAL = ("json", "parquet", "csv", "text", "arrow")


@dataclass(kw_only=True)
class AbstractDatasetData(AbstractLanguageData):
    """Rows that `datasets.load_dataset` finds, each a document."""

    path: str = "json"
    """`json`, `parquet`, `csv`, `text` or `arrow` for `files`; else a folder, or a name on the hub."""
    files: list[str] = field(default_factory=list)
    """Files to read, or patterns of them."""
    validation_files: list[str] = field(default_factory=list)
    """Files to hold out; with them, the share `validation` isn't used."""
    name: str | None = None
    """Which configuration of a data set on the hub."""
    revision: str | None = None
    """Which version of a data set on the hub: a commit, branch or tag."""
    split: str = "train"
    """Which part to read."""
    validation_split: str | None = None
    """Which part to hold out; with it, the share `validation` isn't used."""
    stream: bool = False
    """Read only the first `limit` rows, without downloading the rest."""
    limit: int | None = None
    """Most rows to read of each part; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"{self._name}: limit={self.limit} is below 1. Count rows (data.limit).")
        if self.stream and self.limit is None:
            raise ConfigError(
                f"{self._name}: stream=true has no end, and is kept as tokens before training so that its order "
                "can be repeated. Say how many rows to keep (data.limit)."
            )
        for key in ("name", "revision", "validation_split"):
            if self.path in _LOCAL and getattr(self, key) is not None:
                raise ConfigError(
                    f"{self._name}: {key}={getattr(self, key)} is for data sets on the hub, and path={self.path} reads "
                    f"files. Leave it out; what to hold out goes into data.validation_files (data.{key})."
                )
        if self.validation_files and self.validation_split:
            raise ConfigError(
                f"{self._name}: validation_files={self.validation_files} and validation_split={self.validation_split} "
                "are both given. Leave one out (data.validation_files, data.validation_split)."
            )

    @abstractmethod
    def _document(self, row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Document | None:
        """The document of a row, `validation` not yet settled; None: the row is empty.

        Raises:
            ConfigError: the row lacks a field, or it holds something else than text; `where` says which row.
        """

    @property
    @abstractmethod
    def _key(self) -> Any:
        """JSON value of the settings that decide what becomes of a row."""

    def _read(self, tokenizer: Tokenizer, folder: Path) -> Reading:
        local, held_out = self._local(self.files, "files"), self._local(self.validation_files, "validation_files")
        if self.path in _LOCAL and not local:
            raise ConfigError(
                f"{self._name}: path={self.path} needs files. Name some, or a folder or data set in place of "
                f"{self.path} (data.files, data.path)."
            )
        template = tokenizer.chat_template
        key = [self.path, self.name, self.split, self.validation_split, self.limit, self._key, template]
        if local or Path(self.path).is_dir():
            inside = [file for file in Path(self.path).rglob("*") if file.is_file()] if not local else []
            key += [self._digests(local), self._digests(held_out), self._digests(inside)]
        else:
            key += [self.revision, self._hub_version(folder)]
        where = ", ".join(self.files) or self.path
        rows = f"the first {self.limit:,} rows" if self.limit is not None else "all rows"
        kept = " of the stream, kept as tokens" if self.stream else ""
        return Reading(
            key=key,
            documents=lambda: self._documents(tokenizer, folder, local, held_out),
            what=f"{where} ({self.split}: {rows}{kept})",
            total=self.limit if self.stream else None,
        )

    def _local(self, patterns: list[str], key: str) -> list[Path]:
        found: list[Path] = []
        for pattern in patterns:
            path = at_home(pattern)
            names = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
            files = [match.resolve() for match in map(Path, names) if match.is_file()]
            if not files:
                raise ConfigError(f"{self._name}: there is no file {pattern!r}. Correct it (data.{key}).")
            found += files
        return found

    def _digests(self, files: Iterable[Path]) -> list[str]:
        try:
            return [file_digest(file) for file in files]
        except OSError as error:
            raise ConfigError(
                f"{self._name}: {error.filename} can't be read: {error.strerror}. Mend it (data.files)."
            ) from error

    def _hub_version(self, folder: Path) -> str:
        import datasets

        with self._explained():
            builder = datasets.load_dataset_builder(
                self.path, self.name, revision=self.revision, cache_dir=str(folder / "datasets")
            )
            return str(builder.hash)

    def _explained(self) -> _Explained:
        return _Explained(f"{self._name}: {', '.join(self.files) or self.path!r}")

    def _documents(
        self, tokenizer: Tokenizer, folder: Path, local: list[Path], held_out: list[Path]
    ) -> Iterator[Document]:
        by_hash = not held_out and self.validation_split is None
        for document, text in self._part(tokenizer, folder, local, self.split):
            yield document._replace(validation=by_hash and in_validation(text, self.validation))
        if not by_hash:
            files, split = (held_out, self.split) if held_out else (local, str(self.validation_split))
            for document, _ in self._part(tokenizer, folder, files, split):
                yield document._replace(validation=True)

    def _part(
        self, tokenizer: Tokenizer, folder: Path, files: list[Path], split: str
    ) -> Iterator[tuple[Document, str]]:
        """Documents of a part, and for each the text that it is split by."""
        with self._explained():
            for number, row in enumerate(islice(self._rows(folder, files, split), self.limit)):
                document = self._document(row, f"row {number + 1} of {split}", tokenizer)
                if document is not None:
                    yield document, "".join(text for text, _ in document.pieces)

    def _rows(self, folder: Path, files: list[Path], split: str) -> Iterable[Mapping[str, Any]]:
        import datasets

        # Local files are read as a stream in any case: tokens are kept, and a second copy of the text isn't needed.
        streaming = self.stream or bool(files)
        found: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            self.path,
            self.name,
            data_files={split: [str(file) for file in files]} if files else None,
            split=split,
            revision=self.revision,
            streaming=streaming,
            cache_dir=str(folder / "datasets"),
        )
        return found


class _Explained:
    """Turns whatever a library raises into one line for the person who chose the files."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        import datasets

        self._verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, too
        datasets.disable_progress_bars()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        import datasets

        datasets.logging.set_verbosity(self._verbosity)
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            cause = error.__cause__ if error.__cause__ is not None else error
            why = "it holds no row" if isinstance(cause, StopIteration) else first_line(cause)
            raise ConfigError(
                f"{self._where} can't be read: {why}. Correct it (data.path, data.files, data.name, data.split)."
            ) from error


def _text(row: Mapping[str, Any], name: str, key: str, where: str) -> str:
    """The text in a field of a row; "" where it is empty.

    Raises:
        ConfigError: there is no such field, or it isn't text.
    """
    if name not in row:
        raise ConfigError(f"{where} has no field {name!r}, only {', '.join(row)}. Name one of them (data.{key}).")
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where} has {type(value).__name__} in field {name!r}, not text. Name another (data.{key}).")
    return value or ""


@final
@dataclass(kw_only=True)
class DatasetData(AbstractDatasetData):
    """Rows with a text, and perhaps its class, or another text that it answers."""

    text_field: str = "text"
    """The field that holds the text; with `source_field`, the answer."""
    label_field: str | None = None
    """The field that holds the text's class, for classification: a number or a word."""
    source_field: str | None = None
    """The field that an encoder reads, for sequence to sequence."""
    source_length: int | None = None
    """Most tokens that an encoder reads; None: `length`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.label_field or self.source_field) and self.packing is not Packing.none:
            raise ConfigError(
                f"DatasetData: packing={self.packing.value} mixes rows, and label_field={self.label_field}, "
                f"source_field={self.source_field} belong to one each. Use packing=none (data.packing)."
            )
        if self.source_length is not None and self.source_field is None:
            raise ConfigError(
                f"DatasetData: source_length={self.source_length} means nothing without a source. "
                "Name its field, or leave it out (data.source_field, data.source_length)."
            )
        if self.source_length is not None and self.source_length < 1:
            raise ConfigError(
                f"DatasetData: source_length={self.source_length} is below 1. Use 256 or so (data.source_length)."
            )

    @property
    def _source_length(self) -> int | None:
        return self.source_length

    @property
    def _key(self) -> Any:
        return [self.text_field, self.label_field, self.source_field]

    def _document(self, row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Document | None:
        where = f"DatasetData: {where}"
        text = _text(row, self.text_field, "text_field", where)
        if not text:
            return None
        source = _text(row, self.source_field, "source_field", where) if self.source_field else None
        return Document(pieces=[(text, True)], validation=False, label=self._label(row, where), source=source)

    def _label(self, row: Mapping[str, Any], where: str) -> str | None:
        if self.label_field is None:
            return None
        value = row.get(self.label_field)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ConfigError(
                f"{where} has {value!r} in field {self.label_field!r}, not a class. "
                f"Name one of {', '.join(row)} (data.label_field)."
            )
        return str(value)
