"""Activations that are computed again in backward instead of being kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from strategies.errors import ConfigError

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
COSTLY_OPERATORS = (*_PRODUCTS, "aten._scaled_dot_product_*")
"""Matrix products and attention: nearly all the time of a transformer's forward pass."""


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing:
    """Which blocks keep only their inputs, and what else they keep.

    Raises:
        ConfigError: a value is out of range, or torch has no such operator.
    """

    every: int = 1
    """Of so many blocks, one."""
    keep: tuple[str, ...] = ()
    """Operators whose results are kept all the same, such as `aten.mm`; `*` and `?` as in file names."""
    products_every: int = 1
    """Of kept matrix products, every so many: 2 keeps the first, third... of a block; attention is kept always."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(
                f"Activation checkpointing: every={self.every} is below 1. "
                "1 takes every block, 2 every second (trainer.activation_checkpointing_every)."
            )
        if self.products_every < 1:
            raise ConfigError(
                f"Activation checkpointing: products_every={self.products_every} is below 1. 1 keeps every product, "
                "2 every second (trainer.activation_checkpointing_products_every)."
            )
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in _operators()):
                raise ConfigError(
                    f"Activation checkpointing: torch has no operator {pattern!r}. "
                    "Name them like aten.mm (trainer.activation_checkpointing_keep)."
                )

    def apply(self, blocks: Sequence[nn.Module]) -> None:
        """Make those blocks of a model forget what they compute.

        Args:
            blocks: in the order in which they compute; before anything is wrapped around them.

        Raises:
            ConfigError: there are none.
        """
        if not blocks:
            raise ConfigError(
                "Activation checkpointing: the model has no blocks, which are what is computed again. "
                "Name their classes in `_no_split_modules`, or keep them in an nn.ModuleList "
                "(trainer.activation_checkpointing)."
            )
        for block in blocks[:: self.every]:
            block.forward = _again(block.forward, self.keep, self.products_every)


def _again(forward: Callable[..., Any], keep: tuple[str, ...], products_every: int) -> Callable[..., Any]:
    """`forward`, and once more when its backward pass comes."""

    @functools.cache
    def is_kept(operator: Any) -> bool:
        return any(fnmatchcase(str(operator.overloadpacket), pattern) for pattern in keep)

    def contexts() -> Any:
        """Of one call: products are counted from its beginning, and again when it computes again."""
        products = {False: itertools.count(), True: itertools.count()}

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = is_kept(operator)
            if kept and str(operator.overloadpacket) in _PRODUCTS:
                kept = next(products[context.is_recompute]) % products_every == 0
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]

    options: dict[str, Any] = {"use_reentrant": False}
    if keep:
        options["context_fn"] = contexts

    @functools.wraps(forward)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return outer


@functools.cache
def _operators() -> tuple[str, ...]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return tuple({f"{space}.{name.split('.')[0]}" for space, name in names})
