"""`scripts/train.py` as its user meets it, but in a worker that has torch imported: exit code and what was printed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from strategies.base import Batch, LossTerms
from tests.trainer.jobs import Rows
from trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one rank's start came to."""

    code: object
    """What it would have exited with."""
    err: str
    out: str
    seconds: float


class Bare(Trainer):
    """A subclass that is no dataclass."""

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden


@dataclass(kw_only=True)
class Needy(Trainer):
    """A subclass with a setting that has no default."""

    hidden: int


@dataclass(kw_only=True)
class Odd(Trainer):
    """A subclass with a field of a type that no configuration has."""

    activation: Callable[[], None] | None = None


@dataclass(kw_only=True)
class Tattler(Trainer):
    """Says its secrets to everybody who listens, and fails with them on its lips."""

    api_token: str = ""
    server: str = ""
    fail_at: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._calls = 0

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        """See `Trainer.loss`."""
        self._calls += 1
        logging.getLogger("transformers").warning("the token is %s", self.api_token)
        logging.getLogger("py.warnings").warning(f"{self.server} wants {os.environ['HF_TOKEN']}")
        if self._calls == self.fail_at:
            raise ValueError(f"failed with {self.api_token} at {self.server}, {os.environ['AWS_SECRET_ACCESS_KEY']}")
        return super().loss(outputs, batch)


@dataclass(kw_only=True)
class Hollow(Rows):
    """Makes a model without storage, and says nowhere what is to be in it."""

    def make_model(self) -> nn.Module:
        """See `Trainer.make_model`."""
        with torch.device("meta"):
            return super().make_model()


TRAINERS: dict[str, type[Trainer]] = {cls.__name__: cls for cls in (Trainer, Rows, Bare, Needy, Odd, Hollow, Tattler)}


def start(words: list[str], unset: tuple[str, ...] = (), trainer: str = "Trainer") -> Start:
    """Start a run with the arguments `words`, without the variables `unset`, and say how that ended."""
    from trainer.cli import run

    for name in unset:
        os.environ.pop(name, None)
    begun, code = time.monotonic(), object()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _into(1, out.fileno()), _into(2, err.fileno()), mock.patch.object(sys, "argv", ["train.py", *words]):
            try:
                run(TRAINERS[trainer])
            except SystemExit as end:
                code = end.code
        texts = [os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace") for file in (out, err)]
    return Start(code=code, out=texts[0], err=texts[1], seconds=time.monotonic() - begun)


@contextlib.contextmanager
def _into(descriptor: int, target: int) -> Iterator[None]:
    """What this process writes to `descriptor`, also from C++, goes to `target`."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(descriptor)
    os.dup2(target, descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(before, descriptor)
        os.close(before)


def digests(folder: Path) -> dict[str, str]:
    """What must survive a refused start: every file of a run but logs and lock."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.name != ".lock" and path.parent.name != "logs"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
