"""The training loop, and everything around it that doesn't depend on how a job is spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.cli import run
    from trainer.config import register
    from trainer.trainer import Trainer

__all__ = ["Trainer", "register", "run"]

_HOMES = {"Trainer": "trainer.trainer", "register": "trainer.config", "run": "trainer.cli"}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that a data worker that needs one module doesn't load them all.
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    import importlib

    from trainer.first_import import first_import_of

    with first_import_of("torch"):
        return getattr(importlib.import_module(_HOMES[name]), name)
