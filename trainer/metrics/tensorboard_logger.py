"""TensorBoard event files in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.metrics.base import AbstractLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


@dataclass(kw_only=True)
class TensorBoardLogger(AbstractLogger):
    """Writes what `tensorboard --logdir <run>/tensorboard` shows."""

    directory: str = "tensorboard"
    """Folder of the event files, within the run's."""
    flush_s: int = 10
    """Seconds after which numbers reach the disk at the latest."""

    def __post_init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._folder = Path()

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / self.directory
        # TensorBoard then hides what an earlier start wrote at this step or later.
        purge = step + 1 if self._folder.is_dir() else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=self.flush_s)
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
