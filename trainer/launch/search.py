"""Which jobs a sweep tries."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from trainer.launch.book import Entry

_LONGEST = 40


class Search(ABC):
    """Decides what is tried next, and what isn't worth going on with."""

    @property
    @abstractmethod
    def total(self) -> int:
        """Jobs in all, those that are over among them."""

    @abstractmethod
    def ask(self) -> Entry | None:
        """A job that isn't among the sweep's yet; None: there are no more."""

    @abstractmethod
    def hopeless(self, entry: Entry) -> bool:
        """Whether a running job, of which something new is known, should be stopped."""

    @abstractmethod
    def over(self, entry: Entry) -> None:
        """A job has come to its end, or to this command's."""


class Grid(Search):
    """Each combination once, in their order."""

    def __init__(self, jobs: Sequence[tuple[str, ...]], known: Sequence[Entry]) -> None:
        """Begin, or go on.

        Args:
            jobs: the words of each.
            known: those that are among the sweep's already.
        """
        there = {entry.words for entry in known}
        self._new = [words for words in jobs if words not in there]
        self.total = len(there) + len(self._new)
        self._next = len(known)

    total: int = 0

    def ask(self) -> Entry | None:
        if not self._new:
            return None
        words = self._new.pop(0)
        self._next += 1
        return Entry(name=job_name(self._next - 1, words), words=words)

    def hopeless(self, entry: Entry) -> bool:
        return False

    def over(self, entry: Entry) -> None:
        """Nothing follows from it."""


def job_name(number: int, words: Sequence[str]) -> str:
    """A name that says what is different, such as `003-lr-0-01`."""
    pairs = [word.partition("=")[::2] for word in words]
    parts = [f"{key.rpartition('.')[2].lstrip('+~')}-{readable(value)}" for key, value in pairs]
    text = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(parts))[:_LONGEST].strip("-")
    return f"{number:03d}-{text}".rstrip("-")


def readable(text: str) -> str:
    """The value of a word: a number with as many digits as people read, anything else as it is."""
    try:
        return f"{float(text):.4g}" if re.search(r"[.e]", text) else text
    except ValueError:
        return text
