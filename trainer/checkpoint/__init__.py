"""Checkpoints: the one writer and reader of a run's state on disk, whatever strategy made it."""

from trainer.checkpoint.catalogue import Found
from trainer.checkpoint.checkpointer import Checkpointer, Saved
from trainer.checkpoint.config import Checkpoints, Record

SCHEMAS: tuple[type, ...] = (Checkpoints,)

__all__ = ["SCHEMAS", "Checkpointer", "Checkpoints", "Found", "Record", "Saved"]
