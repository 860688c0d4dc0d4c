"""Loggers: where the numbers of a run go besides `metrics.jsonl`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from strategies.world import World


@dataclass(kw_only=True)
class AbstractLogger(ABC):
    """One sink for numbers and texts. Its fields are its configuration."""

    every_rank: ClassVar[bool] = False
    """Whether it lives on every rank; else on rank 0 only."""

    @abstractmethod
    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin, or go on after `step` (whatever was logged later is to be dropped or overwritten).

        Args:
            folder: the run's folder.
            config: the resolved configuration, secrets already redacted.
            step: 0 for a fresh run.

        Raises:
            ConfigError: the library isn't installed, or its settings are wrong.
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one step."""

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """A text, such as a generated sample; sinks without texts drop it."""

    @abstractmethod
    def close(self) -> None:
        """Flush; may be called twice, and followed by another `open`."""

    def address(self) -> str:
        """Where a person looks at the numbers, once it is open; empty: nowhere in particular."""
        return ""

    # What few need.

    def join(self, world: World, folder: Path) -> None:
        """Before the model is made: refuse what would be refused later, and take what others could take.

        Collective where the logger lives on every rank; `close` follows also where this raises.

        Args:
            world: who takes part.
            folder: the run's.

        Raises:
            ConfigError: on every rank where it lives.
        """

    def advance(self, step: int) -> None:
        """A step was taken, or a batch of an evaluation after `step`; called each time, so it must cost nothing."""

    def event(self, name: str, entries: Mapping[str, Any]) -> None:
        """What goes into `events.jsonl`; the `start` with more in it, and `saving` (`now`: whether training waits)."""
