"""Checkpoints of other systems, read in: DeepSpeed's own and Accelerate's, without either of them."""

from trainer.imports.source import Lazy, Source
from trainer.imports.systems import open_source
from trainer.imports.target import Target

__all__ = ["Lazy", "Source", "Target", "open_source"]
