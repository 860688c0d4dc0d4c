"""TensorBoard event files in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.metrics.base import AbstractLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


_TAKEN = ("", "checkpoints", "logs", "plots", "prometheus", "samples", "mlflow", "wandb")
"""Folders of a run that others write."""


@dataclass(kw_only=True)
class TensorBoardLogger(AbstractLogger):
    """Writes what `tensorboard --logdir <run>/tensorboard` shows."""

    directory: str = "tensorboard"
    """Folder of the event files, within the run's."""
    flush_s: int = 10
    """Seconds after which numbers reach the disk at the latest."""

    def __post_init__(self) -> None:
        if Path(self.directory).name != self.directory or self.directory in _TAKEN or "." in self.directory:
            raise ConfigError(
                f"TensorBoardLogger: directory={self.directory!r} is not the name of a folder of its own in the run's. "
                "Try tensorboard (logger.tensorboard.directory)."
            )
        if self.flush_s < 1:
            raise ConfigError(
                f"TensorBoardLogger: flush_s={self.flush_s} is below 1. Try 10 seconds (logger.tensorboard.flush_s)."
            )
        self._writer: SummaryWriter | None = None
        self._folder = Path()

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / self.directory
        # TensorBoard then hides what an earlier start wrote at this step or later.
        purge = step + 1 if self._folder.is_dir() else None
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=self.flush_s)
        except OSError as error:
            raise ConfigError(
                f"TensorBoardLogger: {self._folder} can't be written: {error.strerror}. Choose another name "
                "(logger.tensorboard.directory)."
            ) from error
        self.text(step, "config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def address(self) -> str:
        return f"tensorboard --logdir {self._folder}"
