"""What is known of a model before it has any storage: its parts, and what a micro-batch of it keeps and computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from strategies.activations import ActivationCheckpointing
from strategies.base import Batch, LossFunction, ModelSpec
from strategies.errors import ConfigError
from strategies.precision import Precision
from trainer.models.base import AbstractModel
from trainer.planner.kernels import Call
from trainer.planner.stages import Stage, Trace
from trainer.planner.trace import trace

_BASE = (2, 3)
"""Samples of the two micro-batches from which larger ones follow: all grows in proportion, and one may be special."""


@dataclass(kw_only=True)
class ModelFacts:
    """A model, what it is trained on, and what was traced of it so far."""

    module: nn.Module
    """On the meta device."""
    batch: Callable[[int], Batch]
    """A micro-batch of so many samples, on CPU."""
    loss: LossFunction
    spec: ModelSpec
    precision: Precision
    device: str = "cuda"
    """Whose operators are taken: `cuda` or `cpu`."""
    cast: bool = False
    """Weights are in the compute dtype themselves, and there is no autocast."""
    _traced: dict[tuple[int, ActivationCheckpointing | None], Trace] = field(default_factory=dict)

    def trace(self, micro_batch: int, how: ActivationCheckpointing | None) -> Trace:
        """One micro-batch.

        Args:
            micro_batch: samples.
            how: which activations are computed again.

        Raises:
            ConfigError: the model can't run without storage.
        """
        key = (micro_batch, how)
        if key not in self._traced and micro_batch > _BASE[-1]:
            few, more = (self.trace(size, how) for size in _BASE)
            self._traced[key] = grown(few, more, micro_batch)
        elif key not in self._traced:
            self._traced[key] = trace(
                self.module,
                self.batch(micro_batch),
                self.loss,
                precision=self.precision,
                activation_checkpointing=how,
                device=self.device,
                cast=self.cast,
            )
        return self._traced[key]

    def model_flops(self, micro_batch: int) -> float:
        """Of matrix products and attention, without what is computed again."""
        return self.trace(micro_batch, None).flops


def facts_of(
    model: AbstractModel,
    slots: float,
    precision: Precision,
    *,
    length: int,
    device: str = "cuda",
    cast: bool = False,
) -> ModelFacts:
    """Of a model that is prepared.

    Args:
        model: of the `model` group.
        slots: moments that the optimizer keeps for each trained number.
        precision: of the step.
        length: tokens that the model reads of a sample.
        device: whose operators are taken.
        cast: see `ModelFacts`.

    Raises:
        ConfigError: the model can't be made without storage.
    """
    try:
        with torch.device("meta"):
            module = model.make()
    except ConfigError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"plan: the model can't be made without storage: {first[:200]}. Make its tensors on the current default "
            "device, and read none of their values while it is made (model)."
        ) from error
    task = model.task()
    reads = length + 1 if task.continues else length
    sample = {
        "tokens": np.arange(reads, dtype=np.int64) % max(2, min(model.vocabulary_size or 2, 100)),
        "label": 0,
        "pixels": np.zeros(_pixels(task), dtype=np.uint8),
    }
    return ModelFacts(
        module=module,
        batch=lambda samples: task.collate([sample] * samples, list(range(samples))),
        loss=task.loss,
        spec=ModelSpec.of(module, slots_per_parameter=slots),
        precision=precision,
        device=device,
        cast=cast,
    )


def _pixels(task: object) -> tuple[int, ...]:
    wanted = getattr(task, "pixels", None)
    return (0,) if wanted is None else (wanted.channels, wanted.height, wanted.width)


def grown(few: Trace, more: Trace, micro_batch: int) -> Trace:
    """A micro-batch of so many samples, from two smaller ones: bytes and FLOPs go on growing as between them.

    Args:
        few: one of them.
        more: the other, of more samples.
        micro_batch: samples.
    """
    times = (micro_batch - few.micro_batch) / (more.micro_batch - few.micro_batch)
    known: dict[tuple[int, int], tuple[Call, ...]] = {}

    def number(one: float, other: float) -> int:
        return round(one + times * (other - one))

    def calls(one: Sequence[Call], other: Sequence[Call]) -> tuple[Call, ...]:
        key = (id(one), id(other))
        if key not in known:
            pairs = zip(one, other, strict=len(one) == len(other))
            known[key] = tuple(
                Call(a.kind, a.flops + times * (b.flops - a.flops), number(a.bytes, b.bytes)) for a, b in pairs
            )
        return known[key]

    def stages(one: Sequence[Stage], other: Sequence[Stage]) -> tuple[Stage, ...]:
        return tuple(
            Stage(
                before=number(a.before, b.before),
                peak=number(a.peak, b.peak),
                calls=calls(a.calls, b.calls),
                moments=tuple(
                    (number(less, most), come) for (less, come), (most, _) in zip(a.moments, b.moments, strict=True)
                ),
            )
            for a, b in zip(one, other, strict=True)
        )

    return replace(
        few,
        forward=stages(few.forward, more.forward),
        backward=stages(few.backward, more.backward),
        micro_batch=micro_batch,
        num_tokens=number(few.num_tokens, more.num_tokens),
    )
