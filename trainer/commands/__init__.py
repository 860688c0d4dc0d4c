"""The commands besides `train`; each is a script of the same name too."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, once for all ranks.

    Args:
        command: the word after `shardwright`.
        description: what the command does.
        rest: what it doesn't know isn't an error, but goes on into `options.rest`, in order.
    """

    def __init__(self, command: str, description: str, *, rest: bool = False) -> None:
        super().__init__(prog=f"shardwright {command}", description=description, allow_abbrev=False)
        self._rest = rest

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words after the command.

        Raises:
            SystemExit: 2 they are wrong; 0 they asked for help, which was printed.
        """
        if not self._rest:
            return self.parse_intermixed_args(list(words))
        options, rest = self.parse_known_args(list(words))
        options.rest = rest
        return options

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        if os.environ.get("RANK", "0") == "0":
            print(f"ConfigError: {self.prog}: {message}. See {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """A word after `shardwright`, imported only when it is used.

    Its module has `parser()`, which must be quick, and `main(options)`, which answers with the exit code.
    """

    module: str
    help: str

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words after its name.

        Raises:
            SystemExit: 2 they are wrong; 0 they asked for help, which was printed.
        """
        parser: Parser = self._module().parser()
        return parser.read(words)

    def run(self, options: argparse.Namespace) -> int:
        """Run it; the exit code."""
        code: int = self._module().main(options)
        return code

    def _module(self) -> Any:
        return importlib.import_module(self.module)


COMMANDS = {
    "launch": Command("trainer.commands.launch", "train with several processes on this machine, or elsewhere"),
    "container": Command("trainer.commands.container", "be the entry point of a SageMaker training job's container"),
    "node": Command("trainer.commands.node", "start a job's processes on this machine, one of several of the job"),
    "plan": Command("trainer.commands.plan", "predict what a configuration takes and costs, and what would fit"),
    "doctor": Command(
        "trainer.commands.doctor", "look at every host and link of a job, and name what is slow or wrong"
    ),
    "export": Command("trainer.commands.export", "turn a checkpoint into a transformers folder"),
    "generate": Command("trainer.commands.generate", "continue prompts with what a run has learned so far"),
    "import-checkpoint": Command(
        "trainer.commands.import_checkpoint", "go on from a checkpoint of DeepSpeed or Accelerate"
    ),
    "report": Command("trainer.commands.report", "show how runs went or go, in one HTML page"),
    "metric-definitions": Command(
        "trainer.commands.metric_definitions", "print the regexes by which SageMaker reads a run's numbers"
    ),
    "monitoring": Command("trainer.commands.monitoring", "write what Prometheus and Grafana need to watch runs"),
    "bench": Command("trainer.commands.bench", "measure what the Trainer costs over a loop written by hand"),
}
