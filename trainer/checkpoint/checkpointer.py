"""Write and read `checkpoints/step-XXXXXXXX/`: tensors by torch.distributed.checkpoint, the rest as JSON.

    step-00001000/
        state.json    progress, scaler, hooks, aliases, the configuration; written last
        tensors/      weights/<name>, optim/<name>/<slot>, average/<name>, local/<rank>/<name>

A folder counts from the moment that it has its name: until then it is called `.partial`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from strategies.errors import ConfigError, TrainingError
from strategies.world import World

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(kw_only=True)
class Checkpoints:
    """When to write checkpoints and how many to keep; the `checkpoint` group of the configuration."""

    every: int | None = 500
    """Optimizer steps between checkpoints; null: only at the end and on the way out."""
    keep: int = 3
    """How many of the newest stay; 0: all."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(
                f"Checkpoints: every={self.every} is below 1. Give optimizer steps, or null (checkpoint.every)."
            )
        if self.keep < 0:
            raise ConfigError(
                f"Checkpoints: keep={self.keep} is negative. Give a number, or 0 to keep all (checkpoint.keep)."
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
    local: list[str] = field(default_factory=list)
    """Names of the tensors that each rank kept for itself."""
    average: bool = False
    """There is a running average of the weights."""
    format: int = FORMAT


class Checkpointer:
    """The one writer and reader of `folder`. Every method is collective unless it says otherwise."""

    def __init__(self, folder: Path, world: World, config: Checkpoints) -> None:
        self._folder = folder
        self._world = world
        self._config = config

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it; None: there is none."""
        mine = [str(path) for path in self._complete()]
        found = self._world.broadcast(mine)
        return Path(found[-1]) if found else None

    def save(self, tensors: Mapping[str, Tensor], record: Record) -> float:
        """Write a checkpoint; return the seconds that it took.

        Raises:
            TrainingError: some rank couldn't write (disk full, no permission); on every rank. What was
                there before stays.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        begin = time.perf_counter()
        final = self._folder / f"step-{int(record.progress['step']):08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            with self._world.together():
                if self._world.rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    (partial / "tensors").mkdir(parents=True)
            writer = dcp.FileSystemWriter(partial / "tensors", sync_files=True)
            with _quiet():
                dcp.save(
                    dict(tensors),
                    storage_writer=writer,
                    process_group=self._world.checkpoint,
                    no_dist=self._world.checkpoint is None,
                )
            with self._world.together():
                if self._world.rank == 0:
                    _write_durably(partial / "state.json", json.dumps(asdict(record), indent=1))
                    _publish(partial, final)
                    self._prune()
        except (Exception, CheckpointException) as error:  # torch's own isn't an Exception
            if self._world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(
                f"Checkpoint: {final} can't be written: {_first_line(error)}. "
                "Earlier checkpoints are untouched; free disk space or choose another run.dir, and start again."
            ) from error
        return time.perf_counter() - begin

    def read_record(self, path: Path) -> Record:
        """The JSON part of the checkpoint at `path`; not collective.

        Raises:
            ConfigError: there is no such checkpoint, or it is damaged or of an unknown format.
        """
        try:
            raw = dict(json.loads((path / "state.json").read_text()))
            if raw.get("format") == FORMAT:
                return Record(**raw)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"Checkpoint: {path} is not a complete checkpoint: {error}. "
                "Remove that folder to go on from the one before, or name another (resume)."
            ) from error
        raise ConfigError(
            f"Checkpoint: {path} has format {raw.get('format')!r}, this version reads {FORMAT}. "
            "Use the version that wrote it, or start afresh with another run.dir (run.dir)."
        )

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Read into `tensors`, in place.

        Raises:
            ConfigError: a name is missing, or has another shape; the index is damaged.
        """
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        from trainer.checkpoint.metadata import IndexReader

        reader = IndexReader(path / "tensors")
        with self._world.together():
            _check(path, tensors, reader)
        try:
            with _quiet():
                dcp.load(
                    dict(tensors),
                    storage_reader=reader,
                    process_group=self._world.checkpoint,
                    no_dist=self._world.checkpoint is None,
                )
        except CheckpointException as error:
            raise ConfigError(
                f"Checkpoint: {path} is damaged: {_first_line(error)}. Remove its folder, or name another (resume)."
            ) from error

    def names(self, path: Path) -> list[str]:
        """The tensors that the checkpoint at `path` holds; not collective."""
        from trainer.checkpoint.metadata import IndexReader

        return sorted(IndexReader(path / "tensors").read_metadata().state_dict_metadata)

    def _complete(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted((path for path in found if (path / "state.json").is_file()), key=_step)

    def _prune(self) -> None:
        for torn in self._folder.glob("step-*.partial"):  # of a start that was killed while it wrote
            shutil.rmtree(torn, ignore_errors=True)
        if self._config.keep:
            for old in self._complete()[: -self._config.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _check(path: Path, tensors: Mapping[str, Tensor], reader: Any) -> None:
    stored = reader.read_metadata().state_dict_metadata
    for name, value in tensors.items():
        if name not in stored:
            raise ConfigError(
                f"Checkpoint: {path} has no {name!r}. Use the model and optimizer that wrote it (model, optimizer), "
                "or start afresh with another run.dir (run.dir)."
            )
        size = tuple(getattr(stored[name], "size", ()))
        if size != tuple(value.shape):
            raise ConfigError(
                f"Checkpoint: {name!r} has shape {size} in {path} and {tuple(value.shape)} in this run. "
                "Use the model that wrote it (model), or start afresh with another run.dir (run.dir)."
            )


def _publish(partial: Path, final: Path) -> None:
    if final.exists():  # a step taken again after a rollback
        stale = final.with_name(final.name + ".stale")
        shutil.rmtree(stale, ignore_errors=True)
        final.rename(stale)
        partial.rename(final)
        shutil.rmtree(stale, ignore_errors=True)
    else:
        partial.rename(final)
    _sync(final.parent)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    """The reason, without the traceback that torch puts into its checkpoint errors."""
    failures = getattr(error, "failures", None)
    if failures:
        error, *_ = next(iter(failures.values()))
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a lone process writes alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
