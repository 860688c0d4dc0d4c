"""Checkpoints: the one writer and reader of a run's state on disk, whatever strategy made it."""

from trainer.checkpoint.checkpointer import Checkpointer, Checkpoints, Record

SCHEMAS: tuple[type, ...] = (Checkpoints,)

__all__ = ["SCHEMAS", "Checkpointer", "Checkpoints", "Record"]
