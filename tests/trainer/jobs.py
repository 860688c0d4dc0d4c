"""Whole training jobs for tests: tiny, on the shared worker processes, with faults where a test wants them."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from strategies.base import Batch, LossTerms
from strategies.errors import ConfigError, TrainingError
from trainer import Trainer, register
from trainer.checkpoint.store import FolderStore
from trainer.data.base import Data
from trainer.hooks.base import Hook, Moment
from trainer.metrics.jsonl import MetricsFile

TINY_LLAMA = (
    "model.config.hidden_size=16",
    "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
)
TINY = (
    *TINY_LLAMA,
    "data=text",
    f"data.paths=[{Path(__file__).parents[2] / 'strategies' / 'base.py'}]",
    "data.length=16",
    "trainer.global_batch=12",
    "trainer.micro_batch=2",
    "trainer.max_steps=12",
    "trainer.log_every=1",
    "trainer.eval_samples=8",
    "optimizer.lr=5e-3",
    "logger=[]",
    "hooks=[]",
    "checkpoint.every=null",
)


@register("hooks", "killer")
@dataclass(kw_only=True)
class Killer(Hook):
    """Sends a signal to one rank's own process after a step, as a scheduler would."""

    step: int = 6
    rank: int = 0
    at: str = "log"

    def on_start(self, moment: Moment) -> str | None:
        return self._kill(moment, "start")

    def on_log(self, moment: Moment) -> str | None:
        return self._kill(moment, "log")

    def on_evaluate(self, moment: Moment) -> str | None:
        return self._kill(moment, "evaluate")

    def _kill(self, moment: Moment, at: str) -> None:
        if at == self.at and moment.progress.step == self.step and moment.world.rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


@register("hooks", "quitter")
@dataclass(kw_only=True)
class Quitter(Hook):
    """Wants to end the run at a step, on one rank only."""

    step: int = 3
    rank: int = 1

    def on_log(self, moment: Moment) -> str | None:
        mine = moment.progress.step == self.step and moment.world.rank == self.rank
        return "rank 1 has had enough" if mine else None


@register("hooks", "filler")
@dataclass(kw_only=True)
class Filler(Hook):
    """Lets `metrics.jsonl` grow no further from one step to another, as a full disk would."""

    step: int = 2
    until: int = 5

    def __post_init__(self) -> None:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._full = mock.patch.object(MetricsFile, "write", side_effect=error)

    def on_log(self, moment: Moment) -> str | None:
        if moment.progress.step == self.step:
            self._full.start()
        if moment.progress.step == self.until:
            self._full.stop()
        return None


@register("hooks", "ender")
@dataclass(kw_only=True)
class Ender(Hook):
    """Leaves a file behind when the run ends."""

    def on_end(self, moment: Moment) -> None:
        (moment.folder / "ended").touch()


@register("hooks", "counter")
@dataclass(kw_only=True)
class Counter(Hook):
    """Counts logged steps over restarts."""

    def __post_init__(self) -> None:
        self.seen = 0

    def on_log(self, moment: Moment) -> str | None:
        self.seen += 1
        return None

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = state.get("seen", 0)


@dataclass(kw_only=True)
class Rows(Trainer):
    """A regression whose samples know their number; `poisoned` ones have no finite loss."""

    poisoned: int = -1
    dropout: float = 0.0
    num_samples: int = 60
    num_validation: int = 10
    broken_rank: int = -1
    failing_rank: int = -1
    """Its loss function raises in the fourth micro-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._calls = 0

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(8, 1))

    def make_data(self) -> Data:
        if int(os.environ.get("RANK", 0)) == self.broken_rank:
            raise ConfigError("Rows: this machine has no such file. Copy it there (data.path).")
        values = np.random.default_rng(0).normal(size=(self.num_samples + self.num_validation, 4))
        rows = [(index, torch.tensor(value, dtype=torch.float32)) for index, value in enumerate(values)]
        return Data(train=rows[: self.num_samples], validation=rows[self.num_samples :])

    def collate(self, samples: list[Any], seeds: list[int]) -> Batch:
        numbers, values = zip(*samples, strict=True)
        inputs = torch.stack(values)
        return Batch(
            inputs={"input": inputs},
            labels=inputs.sum(-1, keepdim=True),
            num_targets=len(samples),
            num_tokens=4 * len(samples),
            extras={"numbers": torch.tensor(numbers)},
        )

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        self._calls += 1
        if self._calls == 4 and int(os.environ.get("RANK", 0)) == self.failing_rank:
            raise ValueError("a mistake in the loss")
        counted = (batch.labels != -100).to(outputs.dtype)
        loss = (F.mse_loss(outputs, batch.labels.to(outputs.dtype), reduction="none") * counted).sum()
        if (batch.extras["numbers"] == self.poisoned).any():
            loss = loss * float("nan")
        return LossTerms(loss=loss)


ROWS = ("trainer.global_batch=12", "trainer.micro_batch=2", "trainer.max_steps=10", "trainer.log_every=1", "logger=[]",
        "hooks=[]", "checkpoint.every=null", "optimizer.lr=1e-2", "model=own", "data=own")  # fmt: skip


def fit(folder: str, overrides: list[str], trainer: str | type[Trainer] = "Trainer") -> dict[str, Any]:
    """One start of a run in this process; what came of it, as plain values."""
    from trainer.build import train
    from trainer.config import compose

    cls = trainer if isinstance(trainer, type) else {"Trainer": Trainer, "Rows": Rows}[trainer]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        config = compose([f"run.dir='{folder}'", f"cache='{Path(folder).parent}/cache'", *overrides], cls)
        outcome = train(config, {key: value for key, _, value in (word.partition("=") for word in overrides)})
    except (ConfigError, TrainingError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        assert {number: signal.getsignal(number) for number in before} == before, "signals were not given back"
        assert not torch.distributed.is_initialized()
    return {
        "stopped": outcome.stopped,
        "reason": outcome.reason,
        "progress": outcome.progress.to_json(),
        "metrics": outcome.metrics,
    }


def fit_on_hosts(folder: str, overrides: list[str], disks: list[str]) -> dict[str, Any]:
    """One start on machines without a common disk: rank `r` has its checkpoints below `disks[r]`."""
    mine = FolderStore(Path(disks[int(os.environ["RANK"])]))
    with mock.patch("trainer.checkpoint.catalogue.open_store", return_value=mine):
        return fit(folder, overrides, "Rows")


def fit_each(folders: list[str], overrides: list[str], trainer: str = "Trainer") -> list[dict[str, Any]]:
    """One run after another in the same processes."""
    return [fit(folder, overrides, trainer) for folder in folders]


def curve(folder: Path) -> list[dict[str, Any]]:
    """What a run learned: its lines without times and memory."""
    clocked = ("_s", "_mib", "slowest_rank", "straggle")
    return [{key: value for key, value in line.items() if not key.endswith(clocked)} for line in lines(folder)]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[Any]:
    """The training loss of each logged step."""
    return [line["loss"] for line in lines(folder) if "loss" in line]


def record_of(folder: Path, step: int | None = None) -> dict[str, Any]:
    """What isn't a tensor of a run's checkpoint, the newest one or that of `step`; it is complete."""
    places = sorted((folder / "checkpoints").glob("step-*" if step is None else f"step-{step:08d}"))
    attempt = json.loads((places[-1] / "manifest.json").read_text())["content"]["attempt"]
    found: dict[str, Any] = json.loads((places[-1] / attempt / "state.json").read_text())
    return found
