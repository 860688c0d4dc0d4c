"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from trainer.metrics.base import AbstractLogger

_ID_FILE = "wandb_run_id"


class WandbMode(Enum):
    """`offline` writes into the run's folder; `wandb sync` sends it later."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class WandbLogger(AbstractLogger):
    """Logs to a W&B run, the same one after every restart.

    W&B can't take numbers back: of steps that were done twice, because a start began at an earlier
    checkpoint, it shows both values. The x axis is `step`, so they lie over each other.
    """

    project: str = "shardwright"
    entity: str | None = None
    """User or team; null: your default one."""
    name: str | None = None
    """Of the run; null: the name of the run's folder."""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = WandbMode.online

    def __post_init__(self) -> None:
        self._run: Any = None
        self._wandb: Any = None

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "WandbLogger: the package wandb isn't installed. "
                "pip install 'shardwright[loggers]', or choose another logger (logger)."
            ) from error
        self._wandb = wandb
        kept = folder / _ID_FILE
        earlier = kept.read_text().strip() if step > 0 and kept.is_file() else ""
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or folder.name,
                group=self.group,
                tags=self.tags,
                mode=self.mode.value,
                dir=str(folder),
                config=dict(config),
                id=earlier or None,
                resume="allow" if earlier else None,
                # Its console capture would fight the live display over stdout.
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            raise ConfigError(
                f"WandbLogger: can't start a run: {' '.join(str(error).split())}. "
                "Call `wandb login`, or set logger.wandb.mode=offline (logger.wandb)."
            ) from error
        kept.write_text(self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log({**metrics, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        if self._run is not None:
            table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
            self._run.log({name: table, "step": step})

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def address(self) -> str:
        if self._run is None:
            return ""
        if self.mode is WandbMode.offline:
            return f"wandb sync {Path(self._run.dir).parent}"
        return str(self._run.url or "")
