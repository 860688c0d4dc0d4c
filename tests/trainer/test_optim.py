from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.trainer.jobs import losses
from tests.trainer.test_fit import run
from trainer.optim import AbstractOptimizer, AdafactorOptimizer, AdamWOptimizer, SGDOptimizer

ALL = (AdamWOptimizer, SGDOptimizer, AdafactorOptimizer)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(self.embed_tokens(tokens)))


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[bool, set[str]]:
    names = {id(value): name for name, value in model.named_parameters()}
    return {group["decays"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("kind", ALL)
def test_make_keeps_norms_and_biases_from_decay(kind: type[AbstractOptimizer]) -> None:
    model = Tiny()
    optimizer = kind(weight_decay=0.3).make(model.named_parameters())
    assert groups_of(model, optimizer) == {
        True: {"embed_tokens.weight", "proj.weight"},
        False: {"proj.bias", "norm.weight", "norm.bias"},
    }
    assert {group["decays"]: group["weight_decay"] for group in optimizer.param_groups} == {True: 0.3, False: 0.0}


def test_make_can_keep_embeddings_from_decay() -> None:
    model = Tiny()
    optimizer = AdamWOptimizer(decay_embeddings=False).make(model.named_parameters())
    assert groups_of(model, optimizer)[True] == {"proj.weight"}


@pytest.mark.parametrize("kind", ALL)
def test_make_leaves_out_frozen_parameters_and_empty_groups(kind: type[AbstractOptimizer]) -> None:
    model = Tiny().requires_grad_(False)
    model.proj.weight.requires_grad_(True)
    optimizer = kind().make(model.named_parameters())
    assert groups_of(model, optimizer) == {True: {"proj.weight"}}


@pytest.mark.parametrize("kind", ALL)
def test_make_without_trainable_parameter_is_refused(kind: type[AbstractOptimizer]) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        kind().make(Tiny().requires_grad_(False).named_parameters())


@pytest.mark.parametrize("kind", ALL)
def test_optimizer_lowers_a_loss(kind: type[AbstractOptimizer]) -> None:
    torch.manual_seed(0)
    model, tokens = Tiny(), torch.arange(5)
    target = torch.randn(5, 4)
    optimizer = kind().make(model.named_parameters())
    losses = []
    for _ in range(20):
        loss = (model(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_adamw_is_fused_where_torch_can_and_takes_its_settings() -> None:
    optimizer = AdamWOptimizer(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3).make(Tiny().named_parameters())
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert optimizer.param_groups[0]["lr"] == 0.5
    meta = AdamWOptimizer().make(Tiny().to("meta").named_parameters())
    assert not meta.param_groups[0]["fused"]


def test_elementwise_is_said_of_those_that_are() -> None:
    assert AdamWOptimizer().elementwise
    assert SGDOptimizer().elementwise
    assert not AdafactorOptimizer().elementwise


def test_adafactor_keeps_far_less_than_the_parameter() -> None:
    weight = nn.Parameter(torch.zeros(100, 80))
    optimizer = AdafactorOptimizer().make([("w", weight)])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[weight].values())
    assert kept < weight.numel() / 10


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        (AdamWOptimizer, {"lr": 0.0}, "lr"),
        (AdamWOptimizer, {"weight_decay": -0.1}, "weight_decay"),
        (AdamWOptimizer, {"beta1": 1.0}, "beta1"),
        (AdamWOptimizer, {"beta2": -0.1}, "beta2"),
        (AdamWOptimizer, {"eps": 0.0}, "eps"),
        (SGDOptimizer, {"momentum": 1.0}, "momentum"),
        (SGDOptimizer, {"nesterov": True}, "momentum"),
        (AdafactorOptimizer, {"beta2_decay": 0.1}, "beta2_decay"),
        (AdafactorOptimizer, {"clip_threshold": 0.5}, "clip_threshold"),
        (AdamWOptimizer, {"lr": float("nan")}, "lr"),
    ],
)
def test_optimizer_with_value_out_of_range_is_refused(
    kind: type[AbstractOptimizer], fields: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.{key}") as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_sgd_of_cut_parameters_learns_as_of_whole_ones(workers: Workers, tmp_path: Path) -> None:
    sgd = ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.lr=0.05", "precision=fp64")
    for strategy in ("ddp", "fsdp_full"):
        run(workers, tmp_path / strategy, 2, f"strategy={strategy}", *sgd, trainer="Rows")
    assert losses(tmp_path / "fsdp_full") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-7)


def test_optimizer_that_needs_whole_parameters_is_refused_where_they_are_cut(workers: Workers, tmp_path: Path) -> None:
    keys = ("optimizer=adafactor", "strategy=fsdp_full")
    answer = run(workers, tmp_path / "run", 2, *keys, trainer="Rows", refused=True)
    assert answer["error"] == "ConfigError"
    assert "it needs whole parameters, and this strategy cuts them" in answer["message"]
