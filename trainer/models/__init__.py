"""Models and what they are trained for: any model of transformers, its tasks, and first weights."""

from __future__ import annotations

from trainer.models.base import AbstractModel, Task
from trainer.models.hf import HFModel
from trainer.models.lora import LoRA
from trainer.models.tasks import CausalTask, ClassificationTask, MaskedTask, Seq2SeqTask

SCHEMAS: tuple[type, ...] = (HFModel, LoRA)

__all__ = [
    "SCHEMAS",
    "AbstractModel",
    "CausalTask",
    "ClassificationTask",
    "HFModel",
    "LoRA",
    "MaskedTask",
    "Seq2SeqTask",
    "Task",
]
