"""Plain text: files and folders, or the standard library of the running Python."""

from __future__ import annotations

import sysconfig
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, final

from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.data.cache import file_digest
from trainer.data.language import AbstractLanguageData, Document, Reading, in_validation
from trainer.place import at_home

# Tests, data tables and generated code, and what newer Pythons no longer have.
_NOT_LIBRARY = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_GENERATED = "_sysconfigdata*"


class TextFile(NamedTuple):
    """A file that is a document."""

    name: str
    """Decides which side of the split it goes to; doesn't depend on where the files lie."""
    path: Path
    validation: bool | None = None
    """None: its name decides."""


@dataclass(kw_only=True)
class AbstractTextData(AbstractLanguageData):
    """Files of UTF-8, each a document; the split goes by file."""

    @abstractmethod
    def _files(self) -> list[TextFile]:
        """The files, in an order that doesn't depend on the machine.

        Raises:
            ConfigError: there are none.
        """

    @property
    @abstractmethod
    def _title(self) -> str:
        """For people."""

    def _read(self, tokenizer: Tokenizer, folder: Path) -> Reading:
        files = self._files()
        try:
            digests = []
            for file in files:
                digests.append((file.name, file_digest(file.path), file.validation))
            megabytes = sum(file.path.stat().st_size for file in files) / 1e6
        except OSError as error:
            raise self._unreadable(file.path, error) from error
        return Reading(
            key=digests,
            documents=lambda: self._documents(files),
            what=f"{self._title}, {len(files)} file{'s' * (len(files) != 1)} of {megabytes:.3g} MB",
            total=len(files),
        )

    def _documents(self, files: list[TextFile]) -> Iterator[Document]:
        if len(files) == 1:
            yield from self._cut(self._text(files[0].path))
            return
        for file, validation in zip(files, self._sides(files), strict=True):
            text = self._text(file.path)
            if text:
                yield Document(pieces=[(text, True)], validation=validation)

    def _sides(self, files: list[TextFile]) -> list[bool]:
        """Whether each file is held out."""
        if files[0].validation is not None:
            return [bool(file.validation) for file in files]
        sides = [in_validation(file.name, self.validation) for file in files]
        if self.validation and len(set(sides)) == 1:
            # Too few files for a share of them: the last one stands for it.
            sides = [file is files[-1] for file in files]
        return sides

    def _cut(self, text: str) -> Iterator[Document]:
        """A single file's end is its validation part, from the next line on."""
        place = round(len(text) * (1 - self.validation))
        place = text.find("\n", place, len(text) - 1) + 1 or place
        for part, validation in ((text[:place], False), (text[place:], True)):
            if part:
                yield Document(pieces=[(part, True)], validation=validation)

    def _text(self, path: Path) -> str:
        try:
            return path.read_bytes().decode()
        except OSError as error:
            raise self._unreadable(path, error) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._name}: {path} is not UTF-8 at byte {error.start}. "
                "Convert it, or leave it out (data.paths, data.exclude)."
            ) from error

    def _unreadable(self, path: Path, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._name}: {path} can't be read: {error.strerror or error}. "
            "Mend it, or leave it out (data.paths, data.exclude)."
        )


@final
@dataclass(kw_only=True)
class TextData(AbstractTextData):
    """Text files, and folders of them."""

    paths: list[str] = field(default_factory=list)
    """Files and folders; a folder stands for the files in and below it that match `pattern`."""
    validation_paths: list[str] = field(default_factory=list)
    """Files and folders to hold out; with them, the share `validation` isn't used."""
    pattern: str = "*.txt"
    """Which files of a folder to read, such as `*.py`."""
    exclude: list[str] = field(default_factory=list)
    """Patterns of names of files and folders inside the folders that are left out."""

    @property
    def _title(self) -> str:
        return ", ".join(self.paths)

    def _files(self) -> list[TextFile]:
        if not self.validation_paths:
            return [TextFile(name, path) for name, path in self._found(self.paths, "paths")]
        return [
            TextFile(name, path, validation)
            for paths, key, validation in (
                (self.paths, "paths", False),
                (self.validation_paths, "validation_paths", True),
            )
            for name, path in self._found(paths, key)
        ]

    def _found(self, paths: list[str], key: str) -> list[tuple[str, Path]]:
        """Name and path of each file, in the order of names."""
        if not paths or not all(paths):
            raise ConfigError(f"TextData: {paths} names no file or folder. Name some (data.{key}).")
        if not self.pattern or Path(self.pattern).is_absolute():
            raise ConfigError(
                f"TextData: pattern={self.pattern!r} matches no name in a folder. Try *.txt (data.pattern)."
            )
        found: dict[str, Path] = {}
        for text in paths:
            path = at_home(text)
            if path.is_dir():
                names = [file.relative_to(path) for file in path.rglob(self.pattern) if file.is_file()]
                files = {name.as_posix(): path / name for name in names if self._wanted(name)}
            elif path.is_file():
                files = {path.name: path}
            else:
                raise ConfigError(f"TextData: there is no file or folder {text!r}. Correct it (data.{key}).")
            found |= {f"{text}/{name}" if name in found else name: file for name, file in files.items()}
        if not found:
            raise ConfigError(
                f"TextData: no file matches {self.pattern!r} in {paths}. Change one of them (data.{key}, data.pattern)."
            )
        return sorted(found.items())

    def _wanted(self, name: Path) -> bool:
        return not any(fnmatch(part, pattern) for part in name.parts for pattern in self.exclude)


@final
@dataclass(kw_only=True)
class PythonStdlibData(AbstractTextData):
    """The source text of the running Python's own standard library: real text that needs no download.

    Without installed packages, tests, data tables, and parts that newer versions have dropped.
    """

    @property
    def _title(self) -> str:
        return f"Python {sysconfig.get_python_version()}'s standard library"

    def _files(self) -> list[TextFile]:
        root = Path(sysconfig.get_path("stdlib"))
        names = [path.relative_to(root) for path in root.rglob("*.py")]
        wanted = [name for name in names if not _NOT_LIBRARY & set(name.parts) and not fnmatch(name.name, _GENERATED)]
        if not wanted:
            raise ConfigError(
                f"PythonStdlibData: there is no source text of the standard library in {root}. "
                "Use a Python that has it, or your own files (data=text)."
            )
        return [TextFile(name.as_posix(), root / name) for name in sorted(wanted)]
