"""Text that a language model writes while it is being trained."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.hooks.base import Hook, Moment
from trainer.metrics.text import printable

_ROUND_TO = 64
"""Lengths are padded to multiples of this, so that a compiled model sees few shapes."""


@dataclass(kw_only=True)
class TextSamples(Hook):
    """Lets a causal language model continue prompts, after evaluations and at the end.

    Every rank runs the same forward passes equally often, whatever is generated, so it works under
    any strategy. There is no cache: each token takes a forward pass over the window, which suits
    short samples. The result depends on the weights, `seed` and the step, not on the number of ranks.
    """

    prompts: list[str] = field(default_factory=lambda: [""])
    length: int = 200
    """Tokens to generate for each prompt."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int | None = 50
    """Draw from that many likeliest tokens; null: from all."""
    every: int = 1
    """Evaluations between samples."""
    window: int = 256
    """The most tokens that the model sees at a time; no more than it is trained on."""
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("length", "every", "window"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"TextSamples: {key}={getattr(self, key)} is below 1. Give a positive number (hooks.samples.{key})."
                )
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"TextSamples: temperature={self.temperature} is not a number from 0 on. Try 0.8, or 0 for the "
                "likeliest token (hooks.samples.temperature)."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"TextSamples: top_k={self.top_k} is below 1. Try 50, or null for all tokens (hooks.samples.top_k)."
            )
        if not self.prompts:
            raise ConfigError('TextSamples: there are no prompts. Give one, such as [""] (hooks.samples.prompts).')
        self._evaluations = 0
        self._written_at: int | None = None
        self._off = False

    def on_start(self, moment: Moment) -> str | None:
        if moment.tokenizer is None:
            self._off = True
            moment.say("samples: the data has no tokenizer, so there is no text to generate (hooks)")
        elif not moment.continues:
            self._off = True
            moment.say("samples: this model's objective isn't to continue a text, so there is none to generate (hooks)")
        return None

    def on_evaluate(self, moment: Moment) -> str | None:
        self._evaluations += 1
        if self._evaluations % self.every == 0:
            self._sample(moment)
        return None

    def on_end(self, moment: Moment) -> None:
        if self._written_at != moment.progress.step:
            self._sample(moment)

    def state(self) -> dict[str, int]:
        return {"evaluations": self._evaluations}

    def load_state(self, state: dict[str, int]) -> None:
        self._evaluations = int(state.get("evaluations", 0))

    def _sample(self, moment: Moment) -> None:
        if self._off or moment.tokenizer is None:
            return
        tokenizer, step = moment.tokenizer, moment.progress.step
        begun = [[tokenizer.boundary, *tokenizer.encode(prompt)] for prompt in self.prompts]
        generator = torch.Generator().manual_seed(_seed(self.seed, step))
        continued = self._generate(moment, begun, generator)
        if continued is None:
            self._off = True
            moment.say("samples: this model doesn't give logits for each token, so there is no text to generate")
            return
        self._written_at = step
        texts = [printable(_text(tokenizer, tokens)) for tokens in continued]
        report = "\n".join(_entry(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True))
        heading = f"step {step}, temperature {self.temperature}, top_k {self.top_k}, seed {self.seed}\n"
        if moment.world.rank == 0:
            path = moment.folder / "samples" / f"step-{step:08d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{heading}\n{report}", encoding="utf-8")
        shown = "\n".join(f"  | {line}" for line in (self.prompts[0] + texts[0]).splitlines())
        moment.say(f"sample at step {step}:\n{shown}")
        # Four spaces: TensorBoard reads Markdown, which would swallow the text's own line breaks.
        moment.log_text("samples", "\n".join(f"    {line}" for line in report.splitlines()))

    def _generate(self, moment: Moment, begun: list[list[int]], generator: torch.Generator) -> list[list[int]] | None:
        """Continuations, one for each of `begun`; None: the model has no logits."""
        assert moment.tokenizer is not None
        rows = [list(row) for row in begun]
        for _ in range(self.length):
            batch = self._window_batch(rows, moment.tokenizer.padding)
            outputs = moment.predict(batch)
            logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
            if logits is None or logits.dim() != 3 or logits.shape[1] != batch.labels.shape[1]:
                return None
            last = torch.tensor([min(len(row), self.window) - 1 for row in rows], device=logits.device)
            rest = logits[torch.arange(len(rows), device=logits.device), last].double().cpu()
            for row, token in zip(rows, self._draw(rest, generator), strict=True):
                row.append(token)
        return [row[len(first) :] for row, first in zip(rows, begun, strict=True)]

    def _window_batch(self, rows: list[list[int]], padding: int) -> Batch:
        """The end of each row, padded behind: a causal model doesn't look there."""
        seen = [row[-self.window :] for row in rows]
        longest = max(len(row) for row in seen)
        width = min(self.window, -(-longest // _ROUND_TO) * _ROUND_TO)
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in seen], dtype=torch.int64)
        return Batch(inputs={"input_ids": tokens}, labels=torch.full_like(tokens, -100), num_targets=0)

    def _draw(self, logits: Tensor, generator: torch.Generator) -> list[int]:
        """Tokens for logits [rows, vocabulary], float64 on CPU, where the generator gives the same everywhere."""
        logits = logits.nan_to_num(nan=float("-inf"))
        if self.temperature == 0:
            return [int(token) for token in logits.argmax(dim=-1)]
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        best = logits.max(dim=-1, keepdim=True).values
        # A model that has diverged still gets its say: all tokens alike.
        logits = torch.where(best.isfinite(), (logits - best) / self.temperature, 0.0)
        return torch.multinomial(logits.exp(), 1, generator=generator).flatten().tolist()


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7], "big")


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Up to the end of the document."""
    end = tokens.index(tokenizer.boundary) if tokenizer.boundary in tokens else len(tokens)
    return tokenizer.decode(tokens[:end])


def _entry(prompt: str, text: str) -> str:
    return f"--- prompt: {prompt!r}\n{prompt}{text}\n"
