"""The run that moves, on the workers: its model, its data, and what each rank saw."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from strategies.base import Batch, LossTerms
from tests.trainer.jobs import TINY_LLAMA, fit
from trainer import Trainer
from trainer.data.base import Data

ROOT = Path(__file__).resolve().parents[2]
BEFORE, AFTER = 6, 10
"""Steps before and after the move."""
STEPS = BEFORE + AFTER
GLOBAL_BATCH = 12
MICRO_BATCHES = {1: 4, 2: 3, 3: 2, 4: 1}
"""World size -> micro-batch: accumulation changes with every move, the global batch never."""
COMMON = (
    f"trainer.max_steps={STEPS}",
    f"trainer.global_batch={GLOBAL_BATCH}",
    "trainer.log_every=1",
    "trainer.eval_every=4",
    "trainer.eval_samples=8",
    "trainer.ema_decay=0.8",
    "optimizer.lr=5e-3",
    "schedule.warmup=4",
    "logger=[]",
    "hooks=[]",
    "backend=gloo",
    "checkpoint.keep=0",
)
LLAMA = (
    *COMMON,
    "model=llama_tiny",
    *TINY_LLAMA,
    "data=text",
    "data.length=48",
    "data.packing=whole",
)
"""A Llama on whole documents packed together, several to a sample, whose second epoch begins after the move."""
DROPOUT = ("model.config.attention_dropout=0.1",)


def write_documents(folder: Path) -> str:
    """Short documents, in files of their own; the word that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "trainer" / "trainer.py").read_text()
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        (folder / f"{number:03}.txt").write_text(paragraph[:160])
    return f"data.paths=['{folder}']"


@dataclass(kw_only=True)
class Seen:
    """What a rank trained on."""

    digests: list[str] = field(default_factory=list)
    """Of each sample, in order."""
    seed: int = 0
    """From which torch's random stream began."""

    def note(self, batch: Batch) -> None:
        """If it is trained on, and not evaluated."""
        if torch.is_grad_enabled():
            self.seed = torch.initial_seed()
            for tokens, targets in zip(next(iter(batch.inputs.values())), batch.labels, strict=True):
                counted = targets != -100  # how wide a sample is padded depends on its micro-batch
                data = torch.stack([tokens[counted], targets[counted]]).numpy().tobytes()
                self.digests.append(hashlib.blake2b(data, digest_size=8).hexdigest())


_SEEN: list[Seen] = []
"""Of this process's starts."""


@dataclass(kw_only=True)
class Llama(Trainer):
    """Of the model group, under observation."""

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        _SEEN[-1].note(batch)
        return super().loss(outputs, batch)


class MixedModel(nn.Module):
    """Tied weights, a frozen parameter, one with less rows than ranks, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.frozen = nn.Linear(12, 12)
        self.frozen.requires_grad_(False)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(1, 12))
        self.head = nn.Linear(12, 50)
        self.head.weight = self.embedding.weight
        self.counted: torch.Tensor
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> Any:
        """Logits [samples, length, 50] of `tokens` [samples, length]."""
        if self.training:
            self.counted += 1
        hidden = self.frozen(self.embedding(tokens))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden * self.scale)


@dataclass(kw_only=True)
class Mixed(Trainer):
    """Trains `MixedModel` on numbers that follow from each other."""

    def make_model(self) -> nn.Module:
        return MixedModel()

    def make_data(self) -> Data:
        starts = torch.arange(150)
        rows = [(start * torch.arange(1, 10) + start // 7) % 50 for start in starts]
        return Data(train=rows[:140], validation=rows[140:])

    def collate(self, samples: list[Any], seeds: list[int]) -> Batch:
        rows = torch.stack(samples)
        return Batch(
            inputs={"tokens": rows[:, :-1]},
            labels=rows[:, 1:],
            num_targets=rows[:, 1:].numel(),
            num_tokens=rows.numel(),
        )

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        _SEEN[-1].note(batch)
        return LossTerms(loss=F.cross_entropy(outputs.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"))


def start(folder: str, words: list[str], trainer: type[Trainer]) -> tuple[dict[str, Any], Seen]:
    """One start on this rank: how it ended, and what it saw."""
    _SEEN.append(Seen())
    with mock.patch("trainer.observer.write_plots", return_value=[]):  # would take longer than all the rest
        ending = fit(folder, words, trainer)
    return ending, _SEEN.pop()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A job that moves."""

    what: str
    """For people."""
    trainer: type[Trainer] = Llama
    words: tuple[str, ...] = LLAMA
    loss: float = 5e-6
    """How far losses may be apart; in fp32 a moment that is lost, or a wrong scale, shows at 1e-3."""
    norm: float = 1e-4
    """The same for gradient norms, relative."""


LLAMA_FP32 = Kind(what="A small Llama on packed documents, fp32.")
KINDS = {
    "mixed": Kind(
        what="Tied weights, a frozen layer, a parameter of one row, a buffer that counts micro-batches.",
        trainer=Mixed,
        words=(*COMMON, "model=own", "data=own", "schedule=linear"),
    ),
    "fp16": Kind(
        what="fp16 with a loss scale that grows every fourth step: scale and count must be equal at the end.",
        words=(*LLAMA, "precision=fp16", "precision.loss_scale=1024", "precision.growth_interval=4"),
        loss=1e-4,
        norm=1e-3,
    ),
    "bf16": Kind(
        what="bf16, with weights and moments in fp32.", words=(*LLAMA, "precision=bf16"), loss=2e-4, norm=1e-2
    ),
    "masked": Kind(
        what="Masked language modelling: the hidden tokens are a part of the order. SGD with momentum.",
        words=(
            *COMMON,
            *("model=bert_tiny", "model.config.hidden_size=16", "model.config.intermediate_size=32"),
            *("model.config.num_hidden_layers=1", "model.config.num_attention_heads=2"),
            *("model.config.hidden_dropout_prob=0", "model.config.attention_probs_dropout_prob=0"),
            *("data=text", "data.length=48", "data.packing=whole"),
            *("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.05"),
        ),
    ),
}
"""Beside the grid's."""
