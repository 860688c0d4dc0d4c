"""Settings of different parts that can't all be meant: refused before the first step, on every rank alike."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.data.base import Data
from trainer.hooks.early_stopping import EarlyStopping
from trainer.hooks.samples import TextSamples
from trainer.job import Job
from trainer.models.base import Task
from trainer.models.images import ImageTask
from trainer.models.tasks import AbstractClassificationTask, Seq2SeqTask

if TYPE_CHECKING:
    from trainer.trainer import Trainer

_LARGEST_BATCH = 1 << 24
_WORKERS_PER_CPU = 8


def refuse_contradictions(trainer: Trainer, job: Job) -> None:
    """What can be seen before the data is read.

    Raises:
        ConfigError: two settings contradict each other, or one can't be meant on this machine.
    """
    if trainer.global_batch > _LARGEST_BATCH:
        raise ConfigError(
            f"Trainer: global_batch={trainer.global_batch} is more than {_LARGEST_BATCH}. "
            "Count samples per optimizer step (trainer.global_batch)."
        )
    if job.profiler is not None:
        job.profiler.refuse_world(job.world)
    if job.precision.numbers is Numbers.fp16 and trainer.on_nonfinite.name != "skip":
        raise ConfigError(
            f"Trainer: on_nonfinite={trainer.on_nonfinite.name} can't go with precision=fp16, whose search for a loss "
            "scale overflows now and then. Use skip, or precision=bf16 (trainer.on_nonfinite, precision)."
        )
    most = _WORKERS_PER_CPU * (os.cpu_count() or 1)
    if job.data is not None and job.data.workers > most:
        raise ConfigError(
            f"Data: workers={job.data.workers} per rank is more than {_WORKERS_PER_CPU} for each of this machine's "
            f"{os.cpu_count()} CPUs. Use at most {most} (data.workers)."
        )
    for name, hook in job.hooks.items():
        every = trainer.eval_every
        if isinstance(hook, EarlyStopping) and (every is None or every >= (trainer.max_steps or math.inf)):
            raise ConfigError(
                f"EarlyStopping: with eval_every={'null' if every is None else every} the only evaluation is at the "
                f"end, so nothing is ever stopped. Evaluate more often, or leave the hook out (trainer.eval_every, "
                f"hooks.{name})."
            )
    _refuse_best_without_choice(trainer, job)


def _refuse_best_without_choice(trainer: Trainer, job: Job) -> None:
    metric, every = job.checkpoints.keep_best, job.checkpoints.every
    if metric is None:
        return
    key = "eval_every" if "val_" in metric else "log_every"
    measured = getattr(trainer, key)
    if every is None or measured is None or (every % measured and measured % every):
        raise ConfigError(
            f"Checkpoints: keep_best={metric} compares checkpoints at steps where it was measured, and every={every} "
            f"and {key}={measured} never fall together on the way. Make one a multiple of the other "
            f"(checkpoint.every, trainer.{key})."
        )


def refuse_misfits(trainer: Trainer, job: Job, data: Data) -> None:
    """What doesn't go together, now that the data has been read and the model is settled. Collective.

    Raises:
        ConfigError: a setting asks for what the data or the model doesn't have.
    """
    if not data.validation:
        _refuse_evaluating(trainer, job)
    with job.world.together():  # whatever a sample is too long for, or lacks, is said before anything is written
        sample = data.train[0]
        if trainer.task is not None and isinstance(sample, dict):
            _refuse_other_kind(trainer.task, "pixels" in sample)
        trainer.collate([sample], [0])
    if trainer.task is not None and isinstance(sample, dict):
        if data.classes and not isinstance(trainer.task, AbstractClassificationTask):
            raise ConfigError(
                f"Data: its {len(data.classes)} classes mean nothing to this model's objective. "
                "Use model.objective=classification, or leave the labels out (data.label_field, model.objective)."
            )
        if isinstance(trainer.task, AbstractClassificationTask) and len(data.classes) > trainer.task.num_labels:
            raise ConfigError(
                f"Data: there are {len(data.classes)} classes, and the model has num_labels={trainer.task.num_labels}. "
                "Raise it (model.num_labels)."
            )
        if "source_tokens" in sample and not isinstance(trainer.task, Seq2SeqTask):
            raise ConfigError(
                "Data: only an encoder reads its sources, and this model's objective has none. "
                "Use model.objective=seq2seq, or leave the sources out (data.source_field, model.objective)."
            )
    if job.model is not None:
        _refuse_beyond_model(job, data)


def _refuse_other_kind(task: Task, images: bool) -> None:
    if images is not isinstance(task, ImageTask):
        what, others, objective = ("images", "text", "image_classification") if images else ("text", "images", "causal")
        raise ConfigError(
            f"Data: its samples are {what}, and this model's objective is for {others}. "
            f"Use model.objective={objective} or other data (data, model.objective)."
        )


def _refuse_evaluating(trainer: Trainer, job: Job) -> None:
    asks = [
        (f"trainer.{key}", value)
        for key in ("eval_every", "eval_samples")
        if (value := getattr(trainer, key)) is not None
    ]
    asks += [(f"hooks.{name}", "on") for name, hook in job.hooks.items() if isinstance(hook, EarlyStopping)]
    if (metric := job.checkpoints.keep_best) is not None and "val_" in metric:
        asks.append(("checkpoint.keep_best", metric))
    for key, value in asks:
        raise ConfigError(
            f"Trainer: {key}={value}, and the data holds nothing out to evaluate on. Hold some out (data.validation), "
            f"or leave {key} out ({key})."
        )


def _refuse_beyond_model(job: Job, data: Data) -> None:
    assert job.model is not None
    size, positions = job.model.vocabulary_size, job.model.positions
    if data.largest_token is not None and data.largest_token >= size:
        raise ConfigError(
            f"Data: token numbers go up to {data.largest_token}, and the model's vocabulary ends at {size - 1}. "
            f"Use {data.largest_token + 1} or more, or other files (model.config.vocab_size, data.paths)."
        )
    for name, hook in job.hooks.items():
        if isinstance(hook, TextSamples) and hook.window > (positions or math.inf):
            raise ConfigError(
                f"TextSamples: window={hook.window} is more than the {positions} positions that the model knows. "
                f"Use {positions} at most (hooks.{name}.window)."
            )
