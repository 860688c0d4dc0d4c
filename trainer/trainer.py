"""The training loop, and what a user overrides to train something of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import nn

from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing
from strategies.base import Batch, LossTerms, Ratio
from strategies.errors import ConfigError
from strategies.timing import phase
from trainer.data.base import Data, Sample
from trainer.job import Job
from trainer.models.base import Task
from trainer.pulse import beating
from trainer.session import Outcome, Session
from trainer.stop import seconds

_SHORTEST_HANG_S = 5
_LONGEST_HANG_S = 30 * 24 * 3600


class Recomputed(Enum):
    """What a block computes again in backward, so that it needn't be kept until then."""

    none = "none"
    """Nothing: all activations are kept."""
    full = "full"
    """All but its inputs."""
    selective = "selective"
    """All but its inputs and the results of the costly operators."""


class NonFinite(Enum):
    """What to do when a step's gradient norm isn't finite. Such a step never changes the weights."""

    skip = "skip"
    stop = "stop"
    rollback = "rollback"


@dataclass(kw_only=True)
class Trainer:
    """Trains a model under any strategy.

    Override `make_model`, `make_data`, `collate`, `loss` or `metrics` to train something of your own,
    and add fields for its settings: a subclass that is a keyword-only dataclass is its own schema, so
    that `trainer.my_field=3` works on the command line.

        @dataclass(kw_only=True)
        class Mine(Trainer):
            hidden: int = 64

            def make_model(self) -> nn.Module:
                return MyModule(self.hidden)

        run(Mine)
    """

    max_steps: int | None = None
    """Optimizer steps in all, over every start. The first limit that is reached ends the run."""
    max_epochs: float | None = None
    """Passes over the training samples in all."""
    max_tokens: int | None = None
    """Real tokens in all."""
    max_time: int | float | str | None = None
    """Of this start: seconds, `30m`, `2h` or `HH:MM:SS`. Ends with a checkpoint, written by then, and exit code 75."""
    grace: int | float | str | None = None
    """Between a signal to stop and the kill; null: 30 s as under torchrun, 120 s on SageMaker, or the launcher's."""
    hang_timeout: int | float | str | None = "15m"
    """Without progress of any rank for so long (four times that before the first step), the run says who is missing
    and ends; null: never."""
    global_batch: int = 32
    """Samples per optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Samples that one rank takes at a time; null: the most that fits. Accumulation follows from it."""
    clip_norm: float | None = 1.0
    """Largest L2 norm of the gradient over all parameters and ranks; null: no clipping."""
    activation_checkpointing: Recomputed = Recomputed.none
    """Keep less between forward and backward: full (a third more compute), or selective (matrix products are kept)."""
    activation_checkpointing_every: int = 1
    """Only of every so many blocks."""
    activation_checkpointing_keep: list[str] = field(default_factory=list)
    """selective: operators whose results are kept, such as aten.mm, with * and ?; empty: matrix products, attention."""
    activation_checkpointing_products_every: int = 1
    """selective: of matrix products, every so many are kept; with 2, about half of them are computed again."""
    log_every: int = 10
    """Optimizer steps between logged lines."""
    communication_every: int | None = 1000
    """Optimizer steps between those whose communication is measured on an accelerator; null: none. CPU: every step."""
    predict: bool = True
    """Say at the start what memory and time the run is predicted to take, and at the end how far that was off."""
    calibration: str | None = None
    """File of `shardwright plan --calibrate`, whose factors these predictions use; null: the published ones."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; null: only at the end."""
    eval_samples: int | None = None
    """Validation samples of an evaluation on the way, the same ones each time; the last one takes all. null: all."""
    on_nonfinite: NonFinite = NonFinite.skip
    """When a step's gradient norm isn't finite: skip it, stop, or roll back to the last checkpoint."""
    ema_decay: float | None = None
    """Keep a running average of the weights with this decay, and evaluate it too."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "max_epochs", "max_tokens", "global_batch", "micro_batch", "clip_norm", "log_every",
                    "communication_every", "eval_every", "eval_samples"):  # fmt: skip
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"Trainer: {key}={value} is not positive. Give a number above 0, or null (trainer.{key})."
                )
        if self.clip_norm == math.inf:
            raise ConfigError("Trainer: clip_norm=inf clips nothing. Give a number, or null (trainer.clip_norm).")
        if self.max_epochs is not None and not math.isfinite(self.max_epochs):
            raise ConfigError(
                f"Trainer: max_epochs={self.max_epochs} never ends. Give a number, or null and another limit "
                "(trainer.max_epochs)."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(
                f"Trainer: ema_decay={self.ema_decay} is not between 0 and 1. Try 0.999, or null (trainer.ema_decay)."
            )
        self.recomputing = self._recomputing()
        seconds(self.max_time, "trainer.max_time")
        seconds(self.grace, "trainer.grace")
        patience_s = seconds(self.hang_timeout, "trainer.hang_timeout")
        if patience_s is not None and not _SHORTEST_HANG_S <= patience_s <= _LONGEST_HANG_S:
            raise ConfigError(
                f"Trainer: hang_timeout={self.hang_timeout} is not between {_SHORTEST_HANG_S} s and 30 days. "
                "Give a time such as 15m, or null (trainer.hang_timeout)."
            )
        self.task: Task | None = None

    def _recomputing(self) -> ActivationCheckpointing | None:
        what, every = self.activation_checkpointing, self.activation_checkpointing_every
        keep = tuple(self.activation_checkpointing_keep)
        selective = what is Recomputed.selective
        products = self.activation_checkpointing_products_every
        given_keys = (
            ("every", every != 1, what is not Recomputed.none),
            ("keep", bool(keep), selective),
            ("products_every", products != 1, selective),
        )
        for key, given, means in given_keys:
            if given and not means:
                raise ConfigError(
                    f"Trainer: activation_checkpointing_{key} means nothing with activation_checkpointing={what.name}. "
                    "Leave it out, or use activation_checkpointing=selective "
                    f"(trainer.activation_checkpointing_{key})."
                )
        if what is Recomputed.none:
            return None
        kept = keep or COSTLY_OPERATORS if selective else ()
        return ActivationCheckpointing(every=every, keep=kept, products_every=products)

    # What a subclass may override.

    def make_model(self) -> nn.Module:
        """The model; called under the strategy's context, after the seed was set."""
        raise AssertionError("the model group makes it")

    def make_data(self) -> Data:
        """The samples; called on every rank, must give the same everywhere."""
        raise AssertionError("the data group makes it")

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        """One micro-batch from samples; randomness only from `seeds`, one number for each."""
        return self._task("collate").collate(samples, seeds)

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        """The loss **summed** over the counted positions of a micro-batch, never averaged."""
        return self._task("loss").loss(outputs, batch)

    def metrics(self, outputs: Any, batch: Batch) -> Mapping[str, Ratio]:
        """More (sum, weight) pairs for evaluation; logged as `val_<name>`."""
        return {} if self.task is None else self.task.metrics(outputs, batch)

    def _task(self, method: str) -> Task:
        if self.task is None:
            raise ConfigError(
                f"{type(self).__name__}: a Trainer that makes its own model must say its own `{method}`. "
                f"Override {method}() (trainer)."
            )
        return self.task

    # The loop.

    def fit(self, job: Job) -> Outcome:
        """Train until a limit, a stop signal, or a hook ends it.

        Returns:
            How it ended; the same on every rank.

        Raises:
            ConfigError: the job is wrong; on every rank.
            TrainingError: it can't go on (a checkpoint can't be written, the loss isn't finite).
        """
        loss = beating(self.loss)
        with Session(self, job) as run, run.told():
            run.start()
            while (step := run.next_step()) is not None:
                run.set_learning_rate()
                with run.observer.watching(self.communication_every):
                    losses = run.strategy.forward_backward(run.model, step.batches, loss, step.targets)
                    with phase("step"):
                        info = run.strategy.step(run.model, run.optimizer)
                run.count(step, info)
                if run.due_to_log():
                    run.log(step, losses, info)
                if run.due(self.eval_every):
                    run.evaluate(self.eval_samples)
                if run.due(job.checkpoints.every):
                    run.save()
                run.commit()
            return run.finish()
