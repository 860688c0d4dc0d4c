"""What a display draws on, and the plain one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType


class Screen(ABC):
    """One way to show a run."""

    @abstractmethod
    def begin(self, total: int | None, step: int) -> None:
        """How far the run is to go, and has come."""

    @abstractmethod
    def open(self) -> None:
        """Start to show."""

    @abstractmethod
    def close(self) -> None:
        """Stop to show; may be called twice."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """A step was done."""

    @abstractmethod
    def logged(self, line: str, step: int, metrics: Mapping[str, float], eta: float | None) -> None:
        """A step's numbers: as a line for programs that read along, and as they are."""

    @abstractmethod
    def evaluated(self, line: str, metrics: Mapping[str, float]) -> None:
        """Numbers of an evaluation, in both forms."""

    @abstractmethod
    def part(self, name: str, done: int, total: int) -> None:
        """How far something has come that holds up the steps."""

    @abstractmethod
    def print(self, text: str, style: str | None = None) -> None:
        """A line for people."""

    @abstractmethod
    def show(self, renderable: RenderableType, text: str) -> None:
        """A table, and the same as text."""


class PlainScreen(Screen):
    """Lines and nothing else."""

    def __init__(self, stream: TextIO | None) -> None:
        """None: shows nothing."""
        self._stream = stream

    def begin(self, total: int | None, step: int) -> None:
        pass

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def logged(self, line: str, step: int, metrics: Mapping[str, float], eta: float | None) -> None:
        self.print(line)

    def evaluated(self, line: str, metrics: Mapping[str, float]) -> None:
        self.print(line)

    def part(self, name: str, done: int, total: int) -> None:
        pass

    def print(self, text: str, style: str | None = None) -> None:
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def show(self, renderable: RenderableType, text: str) -> None:
        self.print(text)
