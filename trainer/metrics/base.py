"""Loggers: where the numbers of a run go besides `metrics.jsonl`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class AbstractLogger(ABC):
    """One sink for numbers and texts; lives on rank 0 only. Its fields are its configuration."""

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
