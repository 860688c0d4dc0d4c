"""What models bring along that a strategy may stumble over: each way to spread a job gives what one process gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, NamedParameters, Plan, Strategy, Weights
from strategies.ddp import DDPStrategy
from strategies.deepspeed import DeepSpeedStrategy, Offload
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.precision import Numbers, Precision
from strategies.testing import Workers, check_tensors

GLOBAL, STEPS = 24, 3
CLOSE = {Numbers.fp64: 1e-9, Numbers.fp32: 2e-5}
SHAPES: dict[str, tuple[int, type[Strategy], dict[str, Any]]] = {
    "ddp": (2, DDPStrategy, {"find_unused": True}),
    "full": (3, FSDPStrategy, {}),
    "full_by_linear": (2, FSDPStrategy, {"wrap": ["Linear"]}),
    "full_whole_gradients": (2, FSDPStrategy, {"reduce_every_micro_batch": False}),
    "grad_op": (2, FSDPStrategy, {"sharding": Sharding.grad_op}),
    "hybrid": (4, FSDPStrategy, {"sharding": Sharding.hybrid, "shard_size": 2}),
    "replicate": (2, FSDPStrategy, {"sharding": Sharding.replicate}),
    "offload": (2, FSDPStrategy, {"cpu_offload": True}),
    "zero1": (2, DeepSpeedStrategy, {"stage": 1, "find_unused": True}),
    "zero2": (3, DeepSpeedStrategy, {"stage": 2, "find_unused": True}),
    "zero3": (2, DeepSpeedStrategy, {"stage": 3, "find_unused": True, "persist_numbers": 0}),
    "nvme": (
        2,
        DeepSpeedStrategy,
        {
            "stage": 3,
            "find_unused": True,
            "persist_numbers": 0,
            "sub_group_numbers": 20,
            "offload_optimizer": Offload.nvme,
            "offload_parameters": Offload.nvme,
        },
    ),
}


def numbers_of(cls: type[Strategy]) -> Numbers:
    """The most exact that it has."""
    return Numbers.fp32 if cls is DeepSpeedStrategy else Numbers.fp64


def skip_without_its_library(cls: type[Strategy]) -> None:
    if cls is DeepSpeedStrategy:
        pytest.importorskip("deepspeed")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.gate = nn.Parameter(torch.full((7,), 0.7))
        self.spare = nn.Parameter(torch.full((3,), 0.5))
        self.down = nn.Linear(7, 5)

    def forward(self, hidden: Tensor, gated: Tensor) -> Tensor:
        inner = self.up(hidden).tanh()
        if bool(gated.any()):  # only some samples have it, so only some ranks use it
            inner = inner + torch.where(gated[:, None], self.gate, torch.zeros_like(self.gate))
        down: Tensor = self.down(inner)
        return hidden + down


class Surprising(nn.Module):
    """Tied ends, a frozen block and vector, parameters that some or no ranks use, two kinds of buffers."""

    seen: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Embedding(6, 5)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.layers[1].requires_grad_(False)
        self.norm = nn.LayerNorm(5)
        self.norm.bias.requires_grad_(False)
        self.end = nn.Linear(5, 6, bias=False)
        self.end.weight = self.start.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5), persistent=False)

    def forward(self, tokens: Tensor, gated: Tensor) -> Tensor:
        hidden = self.start(tokens)
        if self.training:
            self.seen += 1
        for layer in self.layers:
            hidden = layer(hidden, gated)
        logits: Tensor = self.end(self.norm(hidden) * self.scale)
        return logits


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Embedding(6, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5)])
        self.end = nn.Linear(5, 6)

    def forward(self, tokens: Tensor, gated: Tensor) -> Tensor:
        hidden = self.start(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.end(hidden)
        return logits


def made(cls: type[nn.Module], numbers: Numbers = Numbers.fp64) -> nn.Module:
    torch.manual_seed(5)
    return cls().double() if numbers is Numbers.fp64 else cls()


def optimizer(named: NamedParameters) -> Optimizer:
    everything = list(named)
    return AdamW(
        [
            {"params": [value for _, value in everything if value.ndim > 2], "weight_decay": 0.9},  # there is none
            {"params": [value for _, value in everything if value.ndim == 2], "weight_decay": 0.1},
            {"params": [value for _, value in everything if value.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )


def samples(first: int, last: int) -> Batch:
    """Of a global batch the first sample alone is gated, and the last third has no counted position."""
    numbers = torch.arange(first, last)
    labels = (3 * numbers + 1) % 6
    labels[numbers % GLOBAL >= 2 * GLOBAL // 3] = -100
    inputs = {"tokens": (numbers * numbers) % 6, "gated": numbers % GLOBAL == 0}
    return Batch(inputs=inputs, labels=labels, num_targets=int((labels != -100).sum()))


def summed(outputs: Tensor, batch: Batch) -> LossTerms:
    return LossTerms(loss=functional.cross_entropy(outputs, batch.labels, reduction="sum"))


def trained(cls: type[Strategy], settings: dict[str, Any], model_class: type[nn.Module]) -> dict[str, Tensor]:
    """Weights and moments after a few steps, whole, and the losses; an evaluation in between runs out of samples."""
    strategy = cls(**settings)
    world = strategy.connect(GlooBackend(timeout_s=30))
    plan = Plan(micro_batch=GLOBAL // (2 * world.size), accumulation=2, precision=Precision(numbers=numbers_of(cls)))
    none = Weights(seed=0, fill=lambda module: None)
    model, adamw = strategy.setup(made(model_class, numbers_of(cls)), none, optimizer, plan)
    losses = []
    for step in range(STEPS):
        start = step * GLOBAL + world.rank * 2 * plan.micro_batch
        batches = [samples(at, at + plan.micro_batch) for at in (start, start + plan.micro_batch)]
        sums = strategy.forward_backward(model, batches, summed, 2 * GLOBAL / 3)
        strategy.step(model, adamw)
        losses += world.reduce([float(sums.loss)])
        left = samples(0, 1 + world.rank)  # another number on each rank, and the last has none
        strategy.evaluate(model, left.weightless() if world.rank == world.size - 1 else left, summed)
    state = strategy.state(model, adamw)
    found = {**state.weights, **state.optim}
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}
    result = {name: value.detach().clone() for name, value in whole.items()}
    strategy.close()
    return {**result, "losses": torch.tensor(losses)}


def reference() -> dict[str, Tensor]:
    """The same by plain torch, one batch per step."""
    model = made(Surprising)
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    adamw, losses = optimizer(named), []
    for step in range(STEPS):
        batch = samples(step * GLOBAL, (step + 1) * GLOBAL)
        loss = summed(model(**batch.inputs), batch).loss
        (loss / batch.num_targets).backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    found = {name: value.detach() for name, value in model.named_parameters()}
    for name, value in named:
        slots = adamw.state.get(value) or {
            "step": torch.zeros(()),
            **dict.fromkeys(("exp_avg", "exp_avg_sq"), 0 * value),
        }
        found |= {f"{name}/{slot}": moment.detach() for slot, moment in slots.items()}
    return {**found, "losses": torch.tensor(losses)}


@pytest.mark.parametrize("shape", SHAPES)
def test_surprising_model_trains_as_in_one_process(workers: Workers, shape: str) -> None:
    size, cls, settings = SHAPES[shape]
    skip_without_its_library(cls)
    wanted = reference()
    for found in workers.run(trained, size, cls, settings, Surprising, timeout=60):
        assert found.pop("seen") == 2 * STEPS, "each rank counts its own forward passes"
        check_tensors(found, wanted, CLOSE[numbers_of(cls)], "tensor")
        before = dict(made(Surprising, numbers_of(cls)).named_parameters())
        for name in ("layers.0.spare", "layers.1.up.weight", "norm.bias"):
            assert torch.equal(found[name], before[name]), f"{name} was touched"


@pytest.mark.parametrize("shape", ["full", "hybrid", "replicate", "zero1", "zero3"])
def test_batch_norm_keeps_the_statistics_of_rank_0_as_under_ddp(workers: Workers, shape: str) -> None:
    _, cls, settings = SHAPES[shape]
    skip_without_its_library(cls)
    [found, *_] = workers.run(trained, 4, cls, settings, Normalised, timeout=60)
    [wanted, *_] = workers.run(trained, 4, DDPStrategy, {}, Normalised, timeout=60)
    assert {"layers.1.running_mean", "layers.1.running_var"} <= found.keys()
    check_tensors(found, wanted, CLOSE[numbers_of(cls)], "tensor")


def refusal() -> str:
    strategy = FSDPStrategy()
    strategy.connect(GlooBackend())
    model = nn.Linear(2, 2)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    try:
        strategy.setup(model, Weights(seed=0, fill=lambda module: None), optimizer, Plan(micro_batch=1))
    except ConfigError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


def test_parameter_without_dimension_is_refused_by_name(workers: Workers) -> None:
    [heard, other] = workers.run(refusal, 2)
    assert heard == other
    assert "'temperature' is a single number" in heard
