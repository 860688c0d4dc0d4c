"""The log file of each rank, and a console that libraries leave to us."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from trainer.secrets import HidingFormatter

LOGGER = logging.getLogger("shardwright")

_TALKATIVE = ("transformers", "datasets", "huggingface_hub", "accelerate", "peft", "torch", "matplotlib", "filelock",
              "fsspec", "wandb", "mlflow", "deepspeed", "DeepSpeed", "horovod")  # fmt: skip
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MARK = "_shardwright_written"


class Logs:
    """The handlers that `set_up_logs` attached; `close` takes them off again."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / "logs" / f"rank-{rank}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = logging.FileHandler(self.path, encoding="utf-8")
        self._file.setFormatter(HidingFormatter(_FORMAT))
        self._file.addFilter(_once)
        self._console = logging.StreamHandler()
        self._console.setLevel(logging.ERROR)
        self._console.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(name)s: %(message)s"))
        self._attached: list[tuple[logging.Logger, logging.Handler]] = []
        self._propagate: list[tuple[logging.Logger, bool]] = []

    def open(self) -> None:
        """Begin to write."""
        root = logging.getLogger()
        if not root.handlers:
            self._attach(root, self._console)  # with any handler, Python's own last resort falls silent
        self._attach(root, self._file)
        self._own(LOGGER)
        LOGGER.setLevel(logging.INFO)
        self._own(logging.getLogger("py.warnings"))
        logging.captureWarnings(True)
        for name in _TALKATIVE:
            asked_for = name == "torch" and "TORCH_LOGS" in os.environ
            self._attach(logging.getLogger(name) if asked_for else _tamed(name), self._file)

    def close(self) -> None:
        """May be called twice."""
        if not self._attached:
            return
        logging.captureWarnings(False)
        for logger, handler in self._attached:
            logger.removeHandler(handler)
        for logger, propagate in self._propagate:
            logger.propagate = propagate
        self._attached, self._propagate = [], []
        self._file.close()

    def _own(self, logger: logging.Logger) -> None:
        self._propagate.append((logger, logger.propagate))
        logger.propagate = False
        self._attach(logger, self._file)

    def _attach(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._attached.append((logger, handler))


_current: Logs | None = None


def set_up_logs(folder: Path, rank: int) -> Logs:
    """Send everything that this process logs or warns of to `<folder>/logs/rank-<rank>.log`.

    The console keeps the errors of libraries; their warnings and notes, and Python's warnings, go
    to the file only. Calling it again closes the file before.

    Args:
        folder: the run's folder.
        rank: of this process.
    """
    global _current
    if _current is not None:
        _current.close()
    _current = Logs(folder, rank)
    _current.open()
    return _current


class _TamedLogger(logging.Logger):
    """Shows only errors on the console, also through handlers that its library adds when it is imported."""

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802 (logging's own name)
        _only_errors(hdlr)
        super().addHandler(hdlr)


def _tamed(name: str) -> logging.Logger:
    known = logging.Logger.manager.loggerDict.get(name)
    if not isinstance(known, logging.Logger):
        before = logging.getLoggerClass()
        logging.setLoggerClass(_TamedLogger)
        try:
            logging.getLogger(name)
        finally:
            logging.setLoggerClass(before)
    logger = logging.getLogger(name)
    for handler in logger.handlers:
        _only_errors(handler)
    return logger


def _only_errors(handler: logging.Handler) -> None:
    if isinstance(handler, logging.StreamHandler) and _is_console(handler.stream):
        handler.setLevel(max(handler.level, logging.ERROR))


def _is_console(stream: TextIO) -> bool:
    return stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)


def _once(record: logging.LogRecord) -> bool:
    """A record that passes several loggers with our handler is written by the first."""
    if getattr(record, _MARK, False):
        return False
    setattr(record, _MARK, True)
    return True
