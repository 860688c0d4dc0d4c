"""A run's state between memory and checkpoint: which one to go on from, what to write, how to take it up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.base import State
from strategies.errors import ConfigError
from trainer.assembly import Parts
from trainer.checkpoint import Checkpointer, Found, Record, Saved
from trainer.checkpoint.catalogue import absolute, place_of
from trainer.checkpoint.manifest import folder_of
from trainer.ema import WeightAverage
from trainer.job import Job
from trainer.metrics.events import read_events
from trainer.progress import Progress
from trainer.random_state import capture, derive, restore, seed_all
from trainer.run_folder import differences


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What ranks that begin again kept in memory."""

    record: Record
    tensors: dict[str, Tensor]
    address: str = "the last commit, in memory"


@dataclass(kw_only=True)
class Keeper:
    """Saves and restores one session's model, optimizer, average, random streams and hooks."""

    job: Job
    parts: Parts
    average: WeightAverage | None
    say: Callable[[str], None]
    warn: Callable[[str], None]

    def __post_init__(self) -> None:
        config = self.job.checkpoints
        address = self.job.world.broadcast(absolute(config.folder or str(self.job.folder / "checkpoints")))
        self.files = Checkpointer(address, self.job.world, config, self.warn)
        self.save_s = 0.0
        """Seconds that a checkpoint takes, as far as is known."""

    def state(self) -> State:
        """The strategy's canonical state."""
        return self.job.strategy.state(self.parts.model, self.parts.optimizer)

    def weights(self) -> dict[str, Tensor]:
        """The weights of it."""
        return self.job.strategy.weights(self.parts.model, self.parts.optimizer)

    def compute_with(self, weights: Mapping[str, Tensor]) -> None:
        """Evaluate `weights` instead of the model's own."""
        self.job.strategy.compute_with(self.parts.model, self.parts.optimizer, weights)

    def save(self, progress: Progress, **more: Any) -> None:
        """Write a checkpoint, or begin to.

        Args:
            progress: at which step and sample.
            more: further fields of its record.
        """
        state, rank = self.state(), self.job.world.rank
        local = self._local(state)
        record = self._record(progress, state, local=sorted(local), **more)
        self.files.save(self._shared(state), {f"local/{rank}/{name}": value for name, value in local.items()}, record)

    def commit(self, progress: Progress, **more: Any) -> None:
        """Keep in memory what ranks go on from that have lost others; the arguments are those of `save`."""
        assert self.job.world.elastic is not None
        state = self.state()
        note = json.dumps(asdict(self._record(progress, state, **more)))
        self.job.world.elastic.commit(progress.step, note, self._shared(state))

    def _record(self, progress: Progress, state: State, **more: Any) -> Record:
        return Record(
            progress=progress.to_json(),
            world_size=self.job.world.size,
            scaler=state.scaler,
            aliases=state.aliases,
            hooks={name: hook.state() for name, hook in self.job.hooks.items()},
            config=dict(self.job.config),
            choices=dict(self.job.choices),
            average=self.average is not None,
            save_s=self.save_s,
            **more,
        )

    def prepare(self) -> None:
        """After a step, when all moments are there: what later saves can have ready."""
        if self.job.checkpoints.async_save:
            self.files.prepare(self._shared(self.state()))

    def _shared(self, state: State) -> dict[str, Tensor]:
        """All but what each rank has for itself."""
        averages = {} if self.average is None else self.average.tensors()
        return _tensors(state) | {f"average/{name}": value for name, value in averages.items()}

    def finished(self) -> Saved | None:
        """The checkpoint that became complete since the last call; doesn't wait."""
        saved = self.files.finished()
        if saved is not None:
            self.save_s = saved.seconds
        return saved

    def to_resume(self) -> Found | Commit | None:
        """The checkpoint to go on from, or the commit where that is newer; None: begin afresh.

        Raises:
            ConfigError: what `resume` asks for isn't there or isn't whole, or would overwrite newer checkpoints.
        """
        wish = self.job.resume
        if (commit := self._committed()) is not None:
            newest = self.files.newest_step()
            return commit if newest is None or newest <= commit.record.progress["step"] else self.files.newest()
        if wish == "auto":
            found = self.files.newest()
            if found is None:
                self._refuse_to_begin_again()
            return found
        newest = self.files.newest_step()
        if wish == "never":
            if newest is not None:
                raise ConfigError(
                    f"Run: {self.files.address} already holds {folder_of(newest)}, and resume=never would overwrite "
                    "it. Choose another run.dir, or resume=auto (resume)."
                )
            return None
        address, step = self.job.world.broadcast(place_of(wish))
        if newest is None:
            return self._named(address, step)
        if address != self.files.address:
            return self.files.newest()  # started from there once, and has come further since
        if step not in (None, newest):
            raise ConfigError(
                f"Run: {address} holds {folder_of(newest)}, which is newer than {folder_of(step or 0)} and would be "
                "overwritten. Choose another run.dir to branch off, or resume=auto (run.dir, resume)."
            )
        return self.files.newest() if step is None else self.files.at(step)

    def _committed(self) -> Commit | None:
        elastic = self.job.world.elastic
        if elastic is None or (kept := elastic.committed()) is None:
            return None
        return Commit(record=Record(**json.loads(kept[0])), tensors=kept[1])

    def _refuse_to_begin_again(self) -> None:
        """Where checkpoints were written once and none is seen now, beginning afresh would bury what was learned."""
        steps = [event.get("step") for event in read_events(self.job.folder) if event["event"] == "checkpoint"]
        if step := self.job.world.broadcast(steps[-1] if steps else None):
            raise ConfigError(
                f"Run: {self.job.folder} had a checkpoint at step {step}, and {self.files.address} holds none that is "
                "complete. Bring it back, or begin afresh with another run.dir (checkpoint.folder, run.dir)."
            )

    def _named(self, address: str, step: int | None) -> Found:
        files = Checkpointer(address, self.job.world, self.job.checkpoints, self.warn, write=False)
        found = files.newest() if step is None else files.at(step)
        if found is None:
            raise ConfigError(
                f"Run: {address} holds no complete checkpoint. Name a run's folder, or a checkpoint's (resume)."
            )
        return found

    def load(self, found: Found | Commit) -> tuple[Progress, Record]:
        """Take up a checkpoint, whichever strategy and however many ranks wrote it; or a commit.

        Returns:
            How far it had come, and what else was noted with it.

        Raises:
            ConfigError: it is damaged, or of another model or optimizer; on every rank.
        """
        job, world = self.job, self.job.world
        with world.together():
            record = found.record if isinstance(found, Commit) else self.files.read_record(found)
        template = job.strategy.state_template(self.parts.model, self.parts.optimizer)
        tensors, mine = _tensors(template), dict[str, Tensor]()
        if record.world_size == world.size and record.local:
            mine = {name: value for name, value in self._local(template).items() if name in record.local}
            tensors |= {f"local/{world.rank}/{name}": value for name, value in mine.items()}
        averages: dict[str, Tensor] = {}
        if self.average is not None and record.average:
            averages = {name: torch.zeros_like(value) for name, value in template.weights.items()}
            tensors |= {f"average/{name}": value for name, value in averages.items()}
        if isinstance(found, Commit):
            for name, value in tensors.items():
                value.detach().copy_(found.tensors[name])
        else:
            self.files.load(found, tensors)
        self.save_s = record.save_s
        template.scaler, template.local = record.scaler, _part(mine, "strategy.")
        job.strategy.load_state(self.parts.model, self.parts.optimizer, template)
        if self.average is not None and averages:
            self.average.load(averages)
        for name, hook in job.hooks.items():
            hook.load_state(record.hooks.get(name, {}))
        progress = Progress(**_typed(record.progress))
        self._restore_random(_part(mine, "rng."), found, record, progress)
        return progress, record

    def changes(self, record: Record) -> list[str]:
        """In the configuration since then, one line each."""
        if not record.config:
            return []
        now, then = self.job.choices, record.choices
        both = now.keys() & then.keys() & set(record.config)
        others = sorted(group for group in both if now[group] != then[group])
        return [
            *(f"{group}: {then[group]} -> {now[group]}" for group in others),
            *differences(record.config, self.job.config, others),
        ]

    def _restore_random(
        self, streams: dict[str, Tensor], found: Found | Commit, record: Record, progress: Progress
    ) -> None:
        """A rank's own streams if there are as many ranks as there were; else all anew, by one rule for every rank."""
        # Also first, for a device whose stream the checkpoint doesn't have: it would begin again as at step 0.
        seed_all(derive(self.job.seed, "rank", self.job.world.data_rank, "step", progress.step))
        if streams:
            restore(streams, self.job.world.device)
            return
        ranks = f"written by {record.world_size} ranks, this run has {self.job.world.size}"
        elsewhere = "ranks were lost or joined" if isinstance(found, Commit) else "read in from elsewhere"
        why = ranks if record.local else elsewhere
        self.say(f"{why}: random streams (dropout) are derived anew from seed, rank and step")

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
