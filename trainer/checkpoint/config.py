"""When checkpoints are written, where, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from strategies.errors import ConfigError


class Sharing(Enum):
    """Which ranks see the same files below the checkpoint folder."""

    auto = "auto"
    shared = "shared"
    local = "local"


class Best(Enum):
    """Which value of a metric is the best."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class Checkpoints:
    """When and where to write checkpoints and which of them to keep; the `checkpoint` group."""

    every: int | None = 500
    """Optimizer steps between checkpoints; null: only at the end and on the way out."""
    keep: int = 3
    """How many of the newest stay; 0: all."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many optimizer steps stay for good."""
    keep_best: str | None = None
    """Name of a metric, such as `val_loss`: the checkpoint with its best value stays too."""
    keep_best_mode: Best = Best.min
    """Which value of `keep_best` is the best."""
    folder: str | None = None
    """A folder, or an address such as `s3://bucket/prefix`, of this run alone; null: `checkpoints` in `run.dir`."""
    sharing: Sharing = Sharing.auto
    """Whether all machines see one folder or each has its own; auto: found out at the start."""
    verify: bool = True
    """Read every file of a checkpoint and compare its SHA-256 before going on from it."""
    async_save: bool = False
    """Copy the state and go on training while it is written; costs host memory for the copy."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"Checkpoints: every={self.every} is below 1. Give optimizer steps, or null (checkpoint.every)."
            )
        if self.keep < 0:
            raise ConfigError(
                f"Checkpoints: keep={self.keep} is negative. Give a number, or 0 to keep all (checkpoint.keep)."
            )
        if self.keep_every is not None:
            self._check_keep_every(self.keep_every)
        if self.keep == 0 and (self.keep_every is not None or self.keep_best is not None):
            raise ConfigError(
                "Checkpoints: keep=0 keeps all, so keep_every and keep_best have nothing to choose. "
                "Give how many of the newest stay, or leave the others out (checkpoint.keep)."
            )
        if self.keep_best is None and self.keep_best_mode is not Best.min:
            raise ConfigError(
                f"Checkpoints: keep_best_mode={self.keep_best_mode.name} needs a metric. "
                "Name one, such as val_accuracy (checkpoint.keep_best)."
            )
        if self.folder is not None and not self.folder.strip():
            raise ConfigError(
                f"Checkpoints: folder={self.folder!r} names no folder. Give one, or null (checkpoint.folder)."
            )
        if self.folder is not None and "://" in self.folder and self.sharing is not Sharing.auto:
            raise ConfigError(
                f"Checkpoints: sharing={self.sharing.name} is for folders, and folder={self.folder} is seen by all "
                "ranks anyway. Leave it auto (checkpoint.sharing)."
            )

    def _check_keep_every(self, steps: int) -> None:
        if steps < 1:
            raise ConfigError(
                f"Checkpoints: keep_every={steps} is below 1. Give optimizer steps, or null (checkpoint.keep_every)."
            )
        if self.every is None or steps % self.every:
            raise ConfigError(
                f"Checkpoints: keep_every={steps} is not a multiple of every={self.every}, so no checkpoint would be "
                "written there. Choose a multiple (checkpoint.keep_every, checkpoint.every)."
            )


@dataclass(kw_only=True)
class Record:
    """Everything of a checkpoint that isn't a tensor."""

    progress: dict[str, float]
    world_size: int
    scaler: dict[str, float] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    """The option chosen in each group of `config`."""
    local: list[str] = field(default_factory=list)
    """Names of the tensors that each rank kept for itself."""
    average: bool = False
    """There is a running average of the weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of this very step."""
    recent: list[list[float]] = field(default_factory=list)
    """Step, loss and gradient norm of the newest logged steps, to hold the first ones after a resume against."""
    evaluation_due: bool = False
    """The step's evaluation was broken off by a stop."""
    save_s: float = 0.0
    """Seconds that the checkpoint before this one took."""
