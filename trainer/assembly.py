"""Build what a `fit` works with: data, model, optimizer, plan, loader, and where it all ends."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from strategies.base import ModelSpec, Plan, Weights, WorldSpec
from strategies.errors import ConfigError
from strategies.world import Launch, World
from trainer.contradictions import refuse_contradictions, refuse_misfits
from trainer.data import Loader, Order, accumulation_of
from trainer.data.base import Data
from trainer.job import Job
from trainer.limits import Limits
from trainer.metrics.logs import LOGGER
from trainer.micro_batch import find_micro_batch
from trainer.place import at_home
from trainer.planner.beside import Prediction, foresee, forget_tensors_without_storage
from trainer.planner.calibrate import Calibration
from trainer.progress import Progress
from trainer.random_state import derive, seed_all
from trainer.shortage import told

if TYPE_CHECKING:
    from trainer.trainer import Trainer


_LOOKED_AT = 8
"""Samples from which the size of a micro-batch is told."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A job's parts, ready to train."""

    data: Data
    model: nn.Module
    optimizer: Optimizer
    rates: list[float]
    """The learning rate of each parameter group, before the schedule."""
    plan: Plan
    loader: Loader
    spec: ModelSpec
    limits: Limits
    prediction: Prediction | None = None
    """What the run will take; on rank 0, where it can be told quickly."""

    def describe(self, world: World, end: str) -> str:
        """One line for the person at the terminal."""
        plan, ranks = self.plan, "rank" if world.size == 1 else "ranks"
        return (
            f"{self.spec.num_parameters:,} parameters ({self.spec.num_trainable:,} trained) on {world.size} {ranks} "
            f"({world.device.type}); global batch {self.limits.global_batch} = "
            f"{world.data_size} x {plan.accumulation} x {plan.micro_batch} (ranks x accumulation x micro-batch); "
            f"{plan.precision.numbers.name}; {end}"
        )


def assemble(trainer: Trainer, job: Job, say: Callable[[str], None]) -> Parts:
    """Build everything, in the order in which one thing needs another. Collective.

    Raises:
        ConfigError: some setting is wrong, or two contradict each other; on every rank.
    """
    refuse_contradictions(trainer, job)
    data = _make_data(trainer, job, say)
    if job.model is not None:
        with job.world.together():
            job.model.prepare(data.tokenizer)
        trainer.task = job.model.task()
    refuse_misfits(trainer, job, data)
    share = share_of(trainer.global_batch, job.world.data_size)
    micro_batch = trainer.micro_batch or _find_micro_batch(trainer, job, data, share, say)
    plan = _plan(trainer, job, micro_batch, accumulation_of(trainer.global_batch, micro_batch, job.world.data_size))
    limits = _limits(trainer, job, data)
    job.schedule.factor(0, limits.steps_in_all(Progress())[0])  # refuses now what it would refuse at the first step
    model, optimizer, spec, prediction = _set_up(trainer, job, plan, data)
    loader = Loader(
        data.train,
        Order(job.seed, list(data.sources) or [(len(data.train), 1.0)]),
        trainer.collate,
        seed=job.seed,
        global_batch=trainer.global_batch,
        micro_batch=micro_batch,
        data_rank=job.world.data_rank,
        data_size=job.world.data_size,
        workers=workers_of(job),
        pin_memory=job.world.device.type == "cuda",
    )
    if (launch := Launch.from_env()).by is not None:
        say(launch.describe())
    for note in job.world.notes:
        say(note)
    return Parts(
        data=data,
        model=model,
        optimizer=optimizer,
        rates=[float(group["lr"]) for group in optimizer.param_groups],
        plan=plan,
        loader=loader,
        spec=spec,
        limits=limits,
        prediction=prediction,
    )


def share_of(global_batch: int, data_size: int) -> int:
    """Samples of one step on one rank.

    Raises:
        ConfigError: the ranks can't share the global batch evenly.
    """
    if global_batch % data_size:
        below, above = global_batch // data_size * data_size, (global_batch // data_size + 1) * data_size
        choices = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"Trainer: global_batch={global_batch} can't be shared by {data_size} ranks. "
            f"Choose {choices} (trainer.global_batch)."
        )
    return global_batch // data_size


def workers_of(job: Job) -> int:
    """Processes per rank that prepare batches."""
    return 0 if job.data is None else job.data.workers


def _make_data(trainer: Trainer, job: Job, say: Callable[[str], None]) -> Data:
    if job.data is not None:
        data = job.data.build(job.world, at_home(job.cache), say)
    else:
        with job.world.together():
            data = trainer.make_data()
    if len(data.train) == 0:
        raise ConfigError("Trainer: the training data has no sample. Name more text, or use shorter samples (data).")
    if data.description:
        say(data.description)
    return data


def _plan(trainer: Trainer, job: Job, micro_batch: int, accumulation: int) -> Plan:
    return Plan(
        micro_batch=micro_batch,
        accumulation=accumulation,
        clip_norm=trainer.clip_norm,
        precision=job.precision,
        compile=job.compile,
        activation_checkpointing=trainer.recomputing,
        deferred=job.model is not None,
    )


def _set_up(
    trainer: Trainer, job: Job, plan: Plan, data: Data | None = None
) -> tuple[nn.Module, Optimizer, ModelSpec, Prediction | None]:
    """With a prediction where there is `data` to make it from."""
    seed_all(job.seed)  # the same on every rank: so are the fresh weights
    with job.world.together(), job.strategy.init_context(plan):
        module = trainer.make_model() if job.model is None else job.model.make()
    source = Weights(seed=job.seed, fill=_no_fill) if job.model is None else job.model.weights(job.seed)

    def fill(model: nn.Module) -> None:
        with job.world.together():  # a file that one machine lacks
            source.fill(model)

    weights = replace(source, fill=fill)
    spec = ModelSpec.of(module, slots_per_parameter=job.optimizer.slots_per_parameter)
    prediction = None if data is None else _foreseen(trainer, job, plan, data, module, spec)
    with told(lambda: None, spec, plan):
        model, optimizer = job.strategy.setup(module, weights, job.optimizer.make, plan)
    seed_all(derive(job.seed, "rank", job.world.data_rank))
    return model, optimizer, spec, prediction


def _foreseen(
    trainer: Trainer, job: Job, plan: Plan, data: Data, module: nn.Module, spec: ModelSpec
) -> Prediction | None:
    """Before the strategy changes the model; None: not wanted, not on this rank, or it can't be told."""
    calibration: Calibration | None = None
    if trainer.calibration is not None:
        with job.world.together():
            calibration = Calibration.read(at_home(trainer.calibration)) if job.world.rank == 0 else None
    if not trainer.predict or job.world.rank != 0:
        return None
    try:
        own = copy.copy(trainer)  # what a user's methods put there stays apart
        rows = [data.train[index * len(data.train) // _LOOKED_AT] for index in range(_LOOKED_AT)]
        batch = own.collate([rows[index % len(rows)] for index in range(plan.micro_batch)], [*range(plan.micro_batch)])
        return foresee(
            job.strategy,
            spec,
            batch,
            own.loss,
            plan,
            size=job.world.size,
            local_size=job.world.local_size,
            device=job.world.device,
            rates=job.rates,
            calibration=calibration,
            held_bytes=sum(value.nbytes for value in module.parameters() if value.device.type != "meta"),
        )
    except Exception as error:  # no prediction is worth a run
        LOGGER.debug("the run isn't predicted: %s", error, exc_info=True)
    finally:
        forget_tensors_without_storage()
    return None


def _find_micro_batch(trainer: Trainer, job: Job, data: Data, share: int, say: Callable[[str], None]) -> int:
    """Try sizes on the real model, without updating it."""
    plan = _plan(trainer, job, micro_batch=1, accumulation=2)  # one of two: nothing is exchanged
    model, optimizer, spec, _ = _set_up(trainer, job, plan)
    samples = data.train

    def attempt(size: int) -> None:
        rows = [samples[index * len(samples) // size] for index in range(size)]
        batch = trainer.collate(rows, list(range(size))).to(job.world.device)
        job.strategy.forward_backward(model, [batch], trainer.loss, max(batch.num_targets, 1))
        optimizer.zero_grad(set_to_none=True)

    world = WorldSpec(size=job.world.size, local_size=job.world.local_size)
    moments = job.strategy.footprint(spec, world, plan).moments_bytes
    size = find_micro_batch(job.world, share, attempt, moments)
    say(f"micro-batch: {size} of {share} samples per rank and step (trainer.micro_batch)")
    return size


def _limits(trainer: Trainer, job: Job, data: Data) -> Limits:
    samples: dict[str, int] = {}
    if trainer.max_epochs is not None:
        samples["trainer.max_epochs"] = max(1, round(trainer.max_epochs * len(data.train)))
    if trainer.max_tokens is not None:
        samples["trainer.max_tokens"] = math.ceil(trainer.max_tokens / _tokens_per_sample(trainer, job, data))
    if trainer.max_steps is None and not samples and trainer.max_time is None:
        raise ConfigError(
            "Trainer: nothing says when to end. Set trainer.max_steps, trainer.max_epochs, trainer.max_tokens "
            "or trainer.max_time (trainer.max_steps)."
        )
    return Limits(global_batch=trainer.global_batch, max_steps=trainer.max_steps, max_samples=samples)


def _tokens_per_sample(trainer: Trainer, job: Job, data: Data) -> float:
    """From samples spread evenly over the data: a pure function of it, so that schedules stay put."""
    seen = min(64, len(data.train))
    with job.world.together():
        rows = [data.train[index * len(data.train) // seen] for index in range(seen)]
        tokens = trainer.collate(rows, list(range(seen))).num_tokens
    if tokens == 0:
        raise ConfigError(
            "Trainer: max_tokens needs batches that say their num_tokens, and they say 0. "
            "Use trainer.max_steps, or fill in Batch.num_tokens (trainer.max_tokens)."
        )
    return tokens / seen


def _no_fill(model: torch.nn.Module) -> None:
    raise ConfigError(
        f"Trainer: {type(model).__name__} was built without storage, and nothing says how to fill it. Give it storage "
        "in make_model, use a model of the model group, or a strategy that builds models plainly (model, strategy)."
    )
