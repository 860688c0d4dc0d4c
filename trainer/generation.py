"""Continuing a text with a trained model of `transformers`, on one machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError
from trainer.data import Tokenizer
from trainer.metrics.text import printable
from trainer.models.dispatch import main_device
from trainer.models.library import known_positions, quiet

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for a letter of which some bytes are still to come."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    top_k: int | None = None
    """Draw from that many likeliest tokens; None: from all."""
    seed: int = 0
    """Of each prompt, so that no answer hangs on the prompts before it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"generate: --max-new-tokens={self.max_new_tokens} is below 1. Give a number of tokens "
                "(--max-new-tokens)."
            )
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"generate: --temperature={self.temperature} is not a number from 0 on. Try 0.8, or 0 for the "
                "likeliest token (--temperature)."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generate: --top-p={self.top_p} is not in (0, 1]. Try 0.95, or 1 for off (--top-p).")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"generate: --top-k={self.top_k} is below 1. Try 50, or leave it out (--top-k).")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"generate: --seed={self.seed} is not in [0, 2**63). Give another (--seed).")

    def config(self, ends: Sequence[int], padding: int) -> Any:
        """The same for `transformers`."""
        from transformers import GenerationConfig

        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            eos_token_id=list(ends),
            pad_token_id=padding,
            use_cache=True,
            num_beams=1,
            remove_invalid_values=True,  # a model that has diverged still gets its say
            **(drawn if self.temperature > 0 else {}),
        )


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model that continues texts, or answers to them."""

    model: Any
    """Of `transformers`, in evaluation mode; needs its weights only to answer."""
    tokenizer: Tokenizer
    begin: int
    """Token before each prompt, unless an encoder reads it."""
    ends: Sequence[int]
    """Tokens that end a text."""

    @property
    def continues(self) -> bool:
        """Whether the new text goes on where the prompt ends; else it stands for itself."""
        return not self.model.config.is_encoder_decoder

    def read(self, prompt: str, sampling: Sampling) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ConfigError: the model doesn't know so many positions.
        """
        tokens = self.tokenizer.encode(prompt)
        # As in training: a text begins behind the one before it, and what an encoder reads has an end.
        tokens = [self.begin, *tokens] if self.continues else [*tokens, self.tokenizer.boundary]
        limit, new = known_positions(self.model), sampling.max_new_tokens
        if limit is not None and (len(tokens) + new if self.continues else max(len(tokens), new)) > limit:
            raise ConfigError(
                f"generate: {len(tokens)} tokens of the prompt {prompt[:20]!r} and {new} new ones are more than the "
                f"{limit} positions that the model knows. Shorten the prompt, or ask for less (--max-new-tokens)."
            )
        return tokens

    def answer(self, tokens: Sequence[int], sampling: Sampling, write: Callable[[str], None]) -> tuple[str, int]:
        """Continue a prompt.

        Args:
            tokens: of `read`.
            sampling: how.
            write: gets the text piece by piece, as it comes; what could steer a terminal is replaced.

        Returns:
            The new text, and how many tokens it took.
        """
        torch.manual_seed(sampling.seed)
        text = _Text(self.tokenizer, write)
        inputs = torch.tensor([list(tokens)], device=main_device(self.model.hf_device_map))
        with quiet():
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=sampling.config(self.ends, self.tokenizer.padding),
                streamer=text,
            )
        return self.tokenizer.decode(text.tokens), len(text.tokens)


class _Text:
    """Takes tokens as `transformers` makes them."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._write = tokenizer, write
        self._begun = False
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """First what the model was given, then each new token."""
        if not self._begun:
            self._begun = True
            return
        self.tokens += value.flatten().tolist()
        self._show(self._tokenizer.decode(self.tokens).rstrip(_UNFINISHED))

    def end(self) -> None:
        """No more will come."""
        self._show(self._tokenizer.decode(self.tokens))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._write(printable(text[self._shown :]))
            self._shown = len(text)
