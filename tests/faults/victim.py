"""The script that campaigns run: a small job that trains in earnest, and breaks as its environment says.

    shardwright launch --nproc-per-node 2 --script tests/faults/victim.py data.paths=[README.md] key=value ...

Nothing else in here but the model: the same may be done with any script that calls `trainer.run`.
"""

# ruff: noqa: E402 - the first fault may come before torch is imported

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.kit import Kit

KIT = Kit.from_environment()
KIT.begin("starting")

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from strategies.base import Batch, LossTerms
from trainer import Trainer, run

VOCABULARY = 257


class Model(nn.Module):
    """Predicts the next token from those before; with dropout, so that random streams matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.cell = nn.GRU(24, 32, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden, _ = self.cell(self.embedding(tokens))
        return self.head(self.dropout(self.norm(hidden)))


@dataclass(kw_only=True)
class Victim(Trainer):
    """Makes no use of `transformers`, whose import would be most of a start."""

    def make_model(self) -> nn.Module:
        return Model()

    def collate(self, samples: list[Any], seeds: list[int]) -> Batch:
        rows = torch.stack([torch.as_tensor(sample["tokens"]).long() for sample in samples])
        return Batch(
            inputs={"tokens": rows[:, :-1]},
            labels=rows[:, 1:],
            num_targets=rows[:, 1:].numel(),
            num_tokens=rows[:, 1:].numel(),
        )

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        return LossTerms(loss=F.cross_entropy(outputs.flatten(0, 1), batch.labels.flatten(), reduction="sum"))


if __name__ == "__main__":
    with KIT.armed():
        if any(word.startswith("model=") for word in sys.argv):
            run()
        run(Victim)
