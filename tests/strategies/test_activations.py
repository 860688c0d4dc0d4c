"""Activation checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing
from strategies.blocks import find_blocks
from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.trainer.jobs import TINY, fit, losses


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            attention_dropout=0.5, use_cache=False,
        )
    )  # fmt: skip


def kept_and_gradients(how: ActivationCheckpointing | None) -> tuple[int, list[torch.Tensor]]:
    """Numbers kept for the backward pass, and its gradients."""
    model, sizes = llama().train(), []
    if how is not None:
        how.apply(find_blocks(model))

    def keep(value: torch.Tensor) -> torch.Tensor:
        sizes.append(value.numel())
        return value

    torch.manual_seed(1)
    tokens = torch.arange(64).remainder(32).view(2, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return sum(sizes), [value.grad for value in model.parameters() if value.grad is not None]


def test_gradients_are_the_same_bit_for_bit_and_less_is_kept() -> None:
    everything, expected = kept_and_gradients(None)
    kept = []
    for how in (ActivationCheckpointing(), ActivationCheckpointing(every=2)):
        size, gradients = kept_and_gradients(how)
        assert all(map(torch.equal, gradients, expected))
        kept.append(size)
    assert kept[0] < kept[1] < everything
    assert kept[0] < everything / 2


class Counted(TorchDispatchMode):
    """How often each operator really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **kwargs or {})


def test_selective_computes_what_is_kept_only_once() -> None:
    counts = {}
    for keep in ((), COSTLY_OPERATORS, ("aten.mm",)):
        model = llama().train()
        ActivationCheckpointing(keep=keep).apply(find_blocks(model))
        tokens = torch.arange(32).view(1, 32)
        with Counted() as mode:
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        counts[keep] = mode.counts
        assert all(value.grad is not None for value in model.parameters())
    layers, matrices = 4, 7
    products = layers * matrices + 1  # the head, which is in no block
    again = layers * (matrices - 1)  # nothing in the block needs the result of the last one
    assert counts[()]["aten.mm"] == 3 * products + again
    assert counts[COSTLY_OPERATORS]["aten.mm"] == counts[("aten.mm",)]["aten.mm"] == 3 * products
    assert counts[COSTLY_OPERATORS]["aten.silu"] == counts[()]["aten.silu"] == 2 * layers


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"every=0 is below 1.*activation_checkpointing_every\)"):
        ActivationCheckpointing(every=0)
    with pytest.raises(ConfigError, match=r"no operator 'aten\.mmm'.*activation_checkpointing_keep\)"):
        ActivationCheckpointing(keep=("aten.mmm",))
    with pytest.raises(ConfigError, match="no blocks"):
        ActivationCheckpointing().apply(find_blocks(nn.Linear(2, 2)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_full"])
def test_a_run_is_the_same_with_and_without(workers: Workers, tmp_path: Path, strategy: str) -> None:
    words = [*TINY, f"strategy={strategy}", "trainer.max_steps=3", "+model.config.attention_dropout=0.1"]
    how = {
        "none": ["trainer.activation_checkpointing=none"],
        "full": ["trainer.activation_checkpointing=full", "trainer.activation_checkpointing_every=2"],
        "selective": ["trainer.activation_checkpointing=selective"],
    }
    found = {}
    for name, more in how.items():
        workers.run(fit, 2, str(tmp_path / name), [*words, *more])
        found[name] = losses(tmp_path / name)
    assert len(found["none"]) == 3
    assert found["full"] == found["none"]
    assert found["selective"] == found["none"]
