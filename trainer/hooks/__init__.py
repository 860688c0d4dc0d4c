"""What may be added to a run without touching the loop: stopping early, text samples, and hooks of one's own."""

from __future__ import annotations

from trainer.hooks.early_stopping import EarlyStopping
from trainer.hooks.samples import TextSamples

SCHEMAS: tuple[type, ...] = (EarlyStopping, TextSamples)
