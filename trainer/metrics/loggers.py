"""All loggers of a run as one, none of which can end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from strategies.world import World
from trainer.metrics.base import AbstractLogger

_MOST_FAILURES = 3
"""In a row; then a logger is left alone, since one that waits for a dead server holds up every step."""


class Loggers:
    """Hands numbers and texts to each logger; a failing one is reported once, and training goes on."""

    def __init__(self, loggers: Mapping[str, AbstractLogger], say: Callable[[str], None]) -> None:
        """Those that live on this rank.

        Args:
            loggers: by their name in the configuration.
            say: tells the person at the terminal.
        """
        self._loggers = dict(loggers)
        self._say = say
        self._failures = dict.fromkeys(loggers, 0)
        self._complained: set[str] = set()
        self._folder = Path()
        self._config: Mapping[str, Any] = {}

    def join(self, world: World, folder: Path) -> None:
        """Before the model is made.

        Raises:
            ConfigError: a logger can't work here; all are closed.
        """
        try:
            for logger in self._loggers.values():
                logger.join(world, folder)
        except BaseException:
            self.close()
            raise

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin, or go on after `step`, and say where to look.

        Raises:
            ConfigError: a logger's library isn't installed, or its settings are wrong.
        """
        self._folder, self._config = folder, config
        for name, logger in self._loggers.items():
            logger.open(folder, config, step)
            if logger.address():
                self._say(f"{name}: {logger.address()}")

    def rewind(self, step: int) -> None:
        """Go on after `step`, which is earlier than the last one."""
        for name, logger in self._loggers.items():
            self._try(name, logger.close)
            self._try(name, partial(logger.open, self._folder, self._config, step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one step."""
        for name, logger in self._loggers.items():
            self._try(name, partial(logger.log, step, metrics))

    def advance(self, step: int) -> None:
        """A step was taken, or a batch of an evaluation after `step`."""
        for name, logger in self._loggers.items():
            self._try(name, partial(logger.advance, step))

    def event(self, event: str, entries: Mapping[str, Any]) -> None:
        """Something happened besides a step."""
        for name, logger in self._loggers.items():
            self._try(name, partial(logger.event, event, entries))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, such as a generated sample."""
        for logger_name, logger in self._loggers.items():
            self._try(logger_name, partial(logger.text, step, name, text))

    def close(self) -> None:
        """Flush all; may be called twice."""
        for name, logger in self._loggers.items():
            self._failures[name] = 0
            self._try(name, logger.close)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        if self._failures[name] >= _MOST_FAILURES:
            return
        try:
            call()
        except Exception as error:  # whatever a service throws, the training matters more
            self._failures[name] += 1
            if name not in self._complained:
                self._complained.add(name)
                self._say(f"logger {name} failed, training goes on: {type(error).__name__}: {error}")
            if self._failures[name] == _MOST_FAILURES:
                self._say(f"logger {name} failed {_MOST_FAILURES} times in a row and is left alone")
        else:
            self._failures[name] = 0
