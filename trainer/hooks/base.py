"""Hooks: what users add to a run without touching the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.base import Batch
from strategies.world import World
from trainer.data.base import Tokenizer
from trainer.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a hook is given; never the Trainer."""

    progress: Progress
    metrics: Mapping[str, float]
    """The newest numbers, reduced over all ranks and equal on each."""
    world: World
    folder: Path
    """The run's folder."""
    predict: Callable[[Batch], Any]
    """The model's outputs. Collective: every rank calls it, equally often."""
    tokenizer: Tokenizer | None
    say: Callable[[str], None]
    """Print a line to the person at the terminal (rank 0 only; silent elsewhere)."""
    log_text: Callable[[str, str], None]
    """`log_text(name, text)`: hand a text to the loggers."""
    continues: bool = True
    """Whether the model predicts the token after those that it is given, as far as is known."""


@dataclass(kw_only=True)
class Hook:
    """Called on every rank at the same points. A returned text is a reason to end the run, on one rank or all.

    A subclass is a keyword-only dataclass whose fields are its configuration:

        @register("hooks", "goal")
        @dataclass(kw_only=True)
        class Goal(Hook):
            val_loss: float = 1.0

            def on_evaluate(self, moment: Moment) -> str | None:
                reached = moment.metrics["val_loss"] <= self.val_loss
                return f"val_loss is below {self.val_loss}" if reached else None

    Then `hooks=[goal] hooks.goal.val_loss=1.2` chooses it (`trainer.config.register`).
    """

    def on_start(self, moment: Moment) -> str | None:
        """Before the first step of this start."""
        return None

    def on_log(self, moment: Moment) -> str | None:
        """After each logged step."""
        return None

    def on_evaluate(self, moment: Moment) -> str | None:
        """After each evaluation."""
        return None

    def on_end(self, moment: Moment) -> None:
        """After the last step and its evaluation; not when the run is stopped before, to go on later."""

    def state(self) -> dict[str, Any]:
        """What to keep over a restart, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
