"""The commands besides `train`; each is a script of the same name too."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A word after `shardwright`, imported only when it is used."""

    module: str
    help: str

    def run(self, words: Sequence[str]) -> int:
        """Run it on the words after its name; the exit code."""
        code: int = importlib.import_module(self.module).main(list(words))
        return code


COMMANDS = {
    "launch": Command("trainer.commands.launch", "train with several processes on this machine, under torchrun"),
    "plan": Command("trainer.commands.plan", "predict the memory that a configuration takes on each rank"),
    "doctor": Command("trainer.commands.doctor", "show what this machine has, and measure an all-reduce"),
    "export": Command("trainer.commands.export", "turn a checkpoint into a transformers folder"),
    "report": Command("trainer.commands.report", "show how a run went, and draw its plots again"),
}
