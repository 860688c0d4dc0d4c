"""The contract's little model, its data, its optimizers, and the job that a worker is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from strategies.backends import Backend, GlooBackend
from strategies.base import Batch, LossTerms, NamedParameters, Plan, Strategy, Weights
from strategies.precision import Numbers, Precision

GLOBAL_BATCH = 24
LENGTH = 6
VOCABULARY = 13
_SEED = 7


class Recipe(ABC):
    """How a worker makes the strategy under test."""

    @abstractmethod
    def make(self, *, unused: bool = False) -> Strategy:
        """A fresh strategy.

        Args:
            unused: the model has a trainable parameter that no step uses.
        """

    def backend(self) -> Backend:
        """What the ranks talk over."""
        return GlooBackend(timeout_s=60.0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the little model; equal jobs have equal results, so that references are kept by it."""

    rule: str = "sgd"
    """`sgd`, `momentum`, `adamw` (decay on matrices only), or `adamw_fused`."""
    lr: float = 0.5
    clip_norm: float | None = None
    numbers: str = "fp64"
    steps: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which global batches, in which order."""
    accumulation: int = 1
    auxiliary: bool = False
    unused: bool = False
    poisoned: tuple[int, ...] = ()
    """Steps in which one sample's loss isn't a number."""
    on_meta: bool = False
    evaluate_between: bool = False
    growth_interval: int = 2000
    loss_scale: float = 65536.0

    def over(self, steps: tuple[int, ...]) -> Job:
        """The same job over other global batches."""
        return replace(self, steps=steps)

    def plan(self, data_size: int) -> Plan:
        """What the strategy is told."""
        return Plan(
            micro_batch=GLOBAL_BATCH // (data_size * self.accumulation),
            accumulation=self.accumulation,
            clip_norm=self.clip_norm,
            precision=Precision(
                numbers=Numbers[self.numbers], loss_scale=self.loss_scale, growth_interval=self.growth_interval
            ),
        )


class TinyModel(nn.Module):
    """A language model of two layers with everything that a strategy may stumble over.

    The head's matrix is the embedding's; `temper` is frozen; `spare` (where there is one) is never
    used; `shift` is a buffer that is stored and `positions` one that isn't; training and evaluation
    give different outputs.
    """

    shift: Tensor
    positions: Tensor

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.temper = nn.Parameter(torch.full((8,), 1.25), requires_grad=False)
        if unused:
            self.spare = nn.Parameter(torch.full((3, 5), 0.5))
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, 8))
        self.register_buffer("positions", torch.arange(LENGTH) / LENGTH, persistent=False)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [samples, length, vocabulary] of `tokens` int64 [samples, length]."""
        hidden = self.embedding(tokens) + self.shift + self.positions[:, None]
        hidden = hidden + self.down(functional.gelu(self.up(hidden)))
        hidden = self.norm(hidden) * self.temper
        if self.training:
            hidden = hidden * 1.5
        logits: Tensor = self.head(hidden)
        return logits


def make_model(unused: bool) -> TinyModel:
    """The same values each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return TinyModel(unused)


def weights(unused: bool) -> Weights:
    """The values of `make_model` for a module that has storage but no values."""

    def fill(module: nn.Module) -> None:
        source = make_model(unused)
        values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            fill_from_whole(tensor, values[name].detach())

    return Weights(seed=_SEED, fill=fill)


def fill_from_whole(target: Tensor, value: Tensor) -> None:
    """Write the part of `value` that `target` holds here."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert target.shape == value.shape, f"{tuple(target.shape)} in the template, {tuple(value.shape)} in the state"
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = value.to(target.device, target.dtype)
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))
        else:
            target.copy_(value)


def sample(index: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [LENGTH] of sample `index`; how many count differs, and may be none."""
    generator = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)
    labels = tokens[1:].clone()
    position = index % GLOBAL_BATCH
    # With micro-batches of three and of four, a whole one is without weight.
    counted = 0 if position in range(3, 8) else 1 + (5 * index + position) % LENGTH
    labels[counted:] = -100
    return tokens[:-1], labels


def make_batch(indices: range, poisoned: bool = False) -> Batch:
    """One micro-batch of these samples."""
    tokens, labels = (torch.stack(parts) for parts in zip(*map(sample, indices), strict=True))
    poison = torch.ones(len(indices))
    if poisoned and any(index % GLOBAL_BATCH == 10 for index in indices):
        poison[0] = torch.nan
    return Batch(
        inputs={"tokens": tokens},
        labels=labels,
        num_targets=int((labels != -100).sum()),
        num_tokens=tokens.numel(),
        extras={"poison": poison},
    )


def loss(outputs: Tensor, batch: Batch) -> LossTerms:
    """Summed cross-entropy, and how many guesses were right."""
    total = functional.cross_entropy(outputs.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    right = (outputs.argmax(-1) == batch.labels).sum()
    counted = (batch.labels != -100).sum()
    return LossTerms(loss=total * batch.extras["poison"].sum() / len(batch.labels), metrics={"right": (right, counted)})


def loss_with_auxiliary(outputs: Tensor, batch: Batch) -> LossTerms:
    """The same, and a term that is a mean over all positions, counted or not."""
    terms = loss(outputs, batch)
    terms.auxiliary = 0.1 * outputs.square().mean()
    return terms


def make_optimizer(job: Job, named: NamedParameters) -> Optimizer:
    """By names and shapes: decay on matrices only, so that there are two groups."""
    everything = list(named)
    matrices = [value for name, value in everything if not name.endswith("bias") and value.ndim > 1]
    others = [value for name, value in everything if name.endswith("bias") or value.ndim <= 1]
    decay = 0.1 if job.rule.startswith("adamw") else 0.0
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if job.rule.startswith("adamw"):
        return AdamW(groups, lr=job.lr, fused=True if job.rule == "adamw_fused" else None)
    return SGD(groups, lr=job.lr, momentum=0.9 if job.rule == "momentum" else 0.0)
