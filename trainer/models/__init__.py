"""Models and what they are trained for: any model of transformers, its tasks, and first weights."""

from __future__ import annotations

from trainer.models.base import AbstractModel, Task
from trainer.models.hf import HFModel
from trainer.models.images import ImageTask
from trainer.models.lora import LoRA
from trainer.models.tasks import (
    AbstractClassificationTask,
    CausalTask,
    ClassificationTask,
    MaskedTask,
    Seq2SeqTask,
)

SCHEMAS: tuple[type, ...] = (HFModel, LoRA)

__all__ = [
    "SCHEMAS",
    "AbstractClassificationTask",
    "AbstractModel",
    "CausalTask",
    "ClassificationTask",
    "HFModel",
    "ImageTask",
    "LoRA",
    "MaskedTask",
    "Seq2SeqTask",
    "Task",
]
