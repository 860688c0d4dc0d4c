"""A run's state between memory and checkpoint: which one to go on from, what to write, how to take it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.base import State
from strategies.errors import ConfigError
from trainer.assembly import Parts
from trainer.checkpoint import Checkpointer, Record
from trainer.ema import WeightAverage
from trainer.job import Job
from trainer.progress import Progress
from trainer.random_state import capture, derive, restore, seed_all
from trainer.run_folder import differences


@dataclass(kw_only=True)
class Keeper:
    """Saves and restores one session's model, optimizer, average, random streams and hooks."""

    job: Job
    parts: Parts
    average: WeightAverage | None
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.files = Checkpointer(self.job.folder / "checkpoints", self.job.world, self.job.checkpoints)

    def state(self) -> State:
        """The strategy's canonical state."""
        return self.job.strategy.state(self.parts.model, self.parts.optimizer)

    def save(self, progress: Progress) -> float:
        """Write a checkpoint; the seconds that it took."""
        state, rank = self.state(), self.job.world.rank
        local = self._local(state)
        tensors = _tensors(state) | {f"local/{rank}/{name}": value for name, value in local.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.tensors().items()}
        record = Record(
            progress=progress.to_json(),
            world_size=self.job.world.size,
            scaler=state.scaler,
            aliases=state.aliases,
            hooks={name: hook.state() for name, hook in self.job.hooks.items()},
            config=dict(self.job.config),
            local=sorted(local),
            average=self.average is not None,
        )
        return self.files.save(tensors, record)

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from; None: begin afresh.

        Raises:
            ConfigError: what `resume` asks for isn't there, or would overwrite newer checkpoints.
        """
        newest, wish = self.files.newest(), self.job.resume
        if wish == "auto":
            return newest
        if wish == "never":
            if newest is not None:
                raise ConfigError(
                    f"Run: {self.job.folder} already holds {newest.name}, and resume=never would overwrite it. "
                    "Choose another run.dir, or resume=auto (resume)."
                )
            return None
        path = Path(self.job.world.broadcast(str(Path(wish).expanduser().absolute())))
        if other := Checkpointer(path / "checkpoints", self.job.world, self.job.checkpoints).newest():
            path = other
        if newest is None or path == newest:
            return path
        if path.parent == newest.parent:
            raise ConfigError(
                f"Run: {self.job.folder} holds {newest.name}, which is newer than {path.name} and would be "
                "overwritten. Choose another run.dir to branch off, or resume=auto (run.dir, resume)."
            )
        return newest  # started from `path` once, and has come further since

    def load(self, path: Path) -> tuple[Progress, list[str]]:
        """Take up the checkpoint at `path`, whichever strategy and however many ranks wrote it.

        Returns:
            How far it had come, and what changed in the configuration since, one line each.

        Raises:
            ConfigError: it is damaged, or of another model or optimizer; on every rank.
        """
        job, world = self.job, self.job.world
        with world.together():
            record = self.files.read_record(path)
        template = job.strategy.state_template(self.parts.model, self.parts.optimizer)
        tensors, mine = _tensors(template), dict[str, Tensor]()
        if record.world_size == world.size:
            mine = {name: value for name, value in self._local(template).items() if name in record.local}
            tensors |= {f"local/{world.rank}/{name}": value for name, value in mine.items()}
        averages: dict[str, Tensor] = {}
        if self.average is not None and record.average:
            averages = {name: torch.zeros_like(value) for name, value in template.weights.items()}
            tensors |= {f"average/{name}": value for name, value in averages.items()}
        self.files.load(path, tensors)
        template.scaler, template.local = record.scaler, _part(mine, "strategy.")
        job.strategy.load_state(self.parts.model, self.parts.optimizer, template)
        if self.average is not None and averages:
            self.average.load(averages)
        for name, hook in job.hooks.items():
            hook.load_state(record.hooks.get(name, {}))
        progress = Progress(**_typed(record.progress))
        self._restore_random(_part(mine, "rng."), record, progress)
        return progress, differences(record.config, job.config) if record.config else []

    def _restore_random(self, streams: dict[str, Tensor], record: Record, progress: Progress) -> None:
        if streams:
            restore(streams, self.job.world.device)
            return
        seed_all(derive(self.job.seed, "rank", self.job.world.data_rank, "step", progress.step))
        self.say(
            f"written by {record.world_size} ranks, this run has {self.job.world.size}: random streams (dropout) are "
            "derived anew from seed, rank and step"
        )

    def _local(self, state: State) -> dict[str, Tensor]:
        streams = {f"rng.{name}": value for name, value in capture(self.job.world.device).items()}
        return streams | {f"strategy.{name}": value for name, value in state.local.items()}


def _tensors(state: State) -> dict[str, Tensor]:
    return {f"weights/{name}": value for name, value in state.weights.items()} | {
        f"optim/{name}": value for name, value in state.optim.items()
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _typed(raw: dict[str, float]) -> dict[str, Any]:
    return {name: value if name == "seconds" else int(value) for name, value in raw.items()}
