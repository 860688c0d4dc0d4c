"""Cross-entropy over a large vocabulary, a few positions at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from strategies.errors import ConfigError

TARGETS = "loss_targets"
"""The keyword of the model's forward that asks for losses instead of logits."""
_POST_PROCESSING = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "logit_softcap")
"""Fields by which configurations of transformers say that logits are changed after the head."""


def position_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position, in float32 or what is higher.

    Args:
        logits: [N, vocabulary].
        targets: int64 [N]; -100 gives 0.

    Returns:
        [N].
    """
    if logits.dtype.itemsize < torch.float32.itemsize:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


class ChunkedHead(nn.Linear):
    """An output head that can turn hidden states into losses without ever holding all logits.

    With `targets` set, `forward` gives [..., 2]: the loss of each position, and whether its likeliest
    token is the target. Each chunk's logits are made, used and dropped, and made again in backward.
    Without, it is the linear layer that it replaces, whose parameters it takes over.
    """

    def __init__(self, head: nn.Linear, chunk: int) -> None:
        """Take over `head`'s parameters.

        Args:
            head: weight [vocabulary, hidden], with or without bias.
            chunk: positions at a time, > 0.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.chunk = chunk
        self.targets: Tensor | None = None
        self.given: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Logits [..., vocabulary], or [..., 2] with targets."""
        targets, self.targets = self.targets, None
        if targets is None:
            return super().forward(input)
        hidden, wanted = input.flatten(0, -2), targets.flatten()
        parts = [
            cast(Tensor, checkpoint(self._losses, piece, marks, use_reentrant=False, preserve_rng_state=False))
            for piece, marks in zip(torch.split(hidden, self.chunk), torch.split(wanted, self.chunk), strict=True)
        ]
        self.given = torch.cat(parts).view(*targets.shape, 2)
        return self.given

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        losses = position_losses(logits, targets)
        hits = (logits.detach().argmax(dim=-1) == targets).to(losses.dtype)
        return torch.stack([losses, hits], dim=-1)


def use_chunked_head(model: Any, chunk: int) -> None:
    """Replace a `transformers` model's output head, keeping parameters, names and ties.

    Args:
        model: causal, masked or sequence-to-sequence language model.
        chunk: positions at a time, > 0.

    Raises:
        ConfigError: the model changes its logits after the head, or has no plain linear head.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    for key in _POST_PROCESSING:
        if getattr(config, key, None) is not None:
            raise ConfigError(_refusal(name, f"it changes its logits after the head ({key})"))
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise ConfigError(_refusal(name, f"its output head is not a plain linear layer ({kind})"))
    chunked = ChunkedHead(head, chunk)
    model.set_output_embeddings(chunked)
    if model.get_output_embeddings() is not chunked:
        raise ConfigError(_refusal(name, "its output head can't be replaced"))
    model.register_forward_pre_hook(_hand_over, with_kwargs=True)
    model.register_forward_hook(_check_untouched, with_kwargs=True)


def _hand_over(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rest = {key: value for key, value in kwargs.items() if key != TARGETS}
    model.get_output_embeddings().targets = kwargs.get(TARGETS)
    return args, rest


def _check_untouched(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
    """The sign that holds for any model: what the head gave comes out, and not something made of it."""
    head = model.get_output_embeddings()
    asked, given = head.targets is not None, head.given
    head.targets, head.given = None, None
    if torch.compiler.is_compiling():
        return
    if asked or (given is not None and outputs.logits is not given):
        why = "its forward doesn't use the output head" if asked else "it changes its logits after the head"
        raise ConfigError(_refusal(type(model).__name__, why))


def _refusal(name: str, why: str) -> str:
    return f"HFModel: loss_chunk doesn't work with {name}: {why}. Set model.loss_chunk=0 (model.loss_chunk)."
