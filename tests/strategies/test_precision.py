from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.activations import ActivationCheckpointing
from strategies.precision import Numbers, Precision

BF16, CPU = Precision(numbers=Numbers.bf16), torch.device("cpu")


class Copies(TorchDispatchMode):
    """Storages of 16-bit weights."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.made = shape, list[StorageWeakRef]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype is torch.bfloat16 and found.shape == self.shape:
            self.made.append(StorageWeakRef(found.untyped_storage()))
        return found

    @property
    def alive(self) -> int:
        return sum(not each.expired() for each in self.made)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, numbers: Tensor) -> Tensor:
        for block in self.blocks:
            numbers = block(numbers)
        return numbers


def test_16_bit_weights_of_blocks_that_are_computed_again_are_gone_when_these_have_run() -> None:
    model = Stack()
    ActivationCheckpointing().apply(list(model.blocks))
    copies = Copies(torch.Size((16, 16)))
    with copies, BF16.autocast(CPU):
        out = model(torch.randn(3, 16))
        assert len(copies.made) >= 4
        assert copies.alive == 0
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_backward_needs_are_kept() -> None:
    model, copies = Stack(), Copies(torch.Size((16, 16)))
    with copies, BF16.autocast(CPU):
        out = model(torch.randn(3, 16))
    assert copies.alive
    del out
    assert copies.alive == 0
