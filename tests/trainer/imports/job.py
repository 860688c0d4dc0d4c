"""The job that comes over from another system: its model, its samples, and its Trainer here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from strategies.base import Batch, LossTerms
from tests.trainer.jobs import fit
from trainer import Trainer
from trainer.data import Order
from trainer.data.base import Data

BEFORE, AFTER = 3, 5
"""Optimizer steps under the other system, and after the checkpoint."""
GLOBAL_BATCH = 8
LR, DECAY, BETAS, EPS = 3e-3, 0.1, (0.9, 0.95), 1e-8
WORDS = (
    *(f"trainer.global_batch={GLOBAL_BATCH}", "trainer.micro_batch=2", f"trainer.max_steps={BEFORE + AFTER}"),
    *("trainer.log_every=1", "trainer.clip_norm=null", "schedule=constant", "schedule.warmup=0"),
    *(f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", "optimizer.beta1=0.9", "optimizer.beta2=0.95"),
    *("logger=[]", "hooks=[]", "checkpoint.every=null"),
)


class Model(nn.Module):
    """Tied weights, a frozen layer, sizes that ranks can't share evenly, a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(2)])
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 23)
        self.head.weight = self.embedding.weight
        self.counted: torch.Tensor
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> Any:
        """Logits [samples, length, 23] of `tokens` [samples, length]."""
        if self.training:
            self.counted += 1
        hidden = self.frozen(self.embedding(tokens))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(self.norm(hidden))


def model() -> Model:
    """The same fresh weights on every rank and in every case."""
    torch.manual_seed(0)
    return Model()


def samples() -> list[torch.Tensor]:
    """Numbers that follow from each other."""
    return [(start * torch.arange(1, 10) + start // 5) % 23 for start in torch.arange(90)]


def rows_of(step: int) -> torch.Tensor:
    """The global batch of an optimizer step, in the order that ours draws with seed 0."""
    known = samples()
    indices, _ = Order(0, [(len(known), 1.0)]).span(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    return torch.stack([known[index] for index in indices])


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """What decays and what doesn't, as ours divides them."""
    trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    groups = {decays: [value for _, value in trained if (value.dim() >= 2) is decays] for decays in (True, False)}
    return [{"params": groups[True], "weight_decay": DECAY}, {"params": groups[False], "weight_decay": 0.0}]


@dataclass(kw_only=True)
class Comer(Trainer):
    """Trains `Model` here."""

    def make_model(self) -> nn.Module:
        return Model()

    def make_data(self) -> Data:
        return Data(train=samples())

    def collate(self, samples: list[Any], seeds: list[int]) -> Batch:
        rows = torch.stack(samples)
        return Batch(inputs={"tokens": rows[:, :-1]}, labels=rows[:, 1:], num_targets=rows[:, 1:].numel())

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        return LossTerms(loss=F.cross_entropy(outputs.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"))


def go_on(folder: str, words: list[str]) -> dict[str, Any]:
    """Train on in this process, from what was read in."""
    return fit(folder, [*WORDS, "model=own", "data=own", *words], Comer)
