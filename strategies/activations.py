"""Activations that are computed again in backward instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from strategies.errors import ConfigError

COSTLY_OPERATORS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_dot_product_*")
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

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(
                f"Activation checkpointing: every={self.every} is below 1. "
                "1 takes every block, 2 every second (trainer.activation_checkpointing_every)."
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
            block.forward = _again(block.forward, self.keep)


def _again(forward: Callable[..., Any], keep: tuple[str, ...]) -> Callable[..., Any]:
    """`forward`, and once more when its backward pass comes."""

    @functools.cache
    def is_kept(operator: Any) -> bool:
        return any(fnmatchcase(str(operator.overloadpacket), pattern) for pattern in keep)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if keep:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

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
