"""What is hidden from a model that learns by filling in: pure functions of a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.base import Tokens

Flags = NDArray[np.bool_]


def mask_tokens(
    tokens: Tokens, allowed: Flags, seed: int, *, share: float, mask: int, vocabulary_size: int
) -> tuple[Tokens, Flags]:
    """Choose tokens to be predicted and hide most of them.

    Of the chosen ones, 80 % become `mask`, 10 % any token, and 10 % stay.

    Args:
        tokens: int64 [n].
        allowed: bool [n], which tokens may be chosen.
        seed: decides everything.
        share: of the allowed tokens, in (0, 1]; at least one is chosen where one is allowed.
        mask: the token that hides.
        vocabulary_size: random tokens are below it.

    Returns:
        What the model reads, int64 [n], and which tokens it must predict, bool [n].

    Source: Devlin et al. 2019, section 3.1.
    """
    generator = np.random.default_rng(seed)
    candidates = np.flatnonzero(allowed)
    chosen = generator.permutation(candidates)[: max(1, round(share * len(candidates)))]
    fate = generator.random(len(chosen))
    others = generator.integers(0, vocabulary_size, len(chosen))
    read = tokens.copy()
    read[chosen] = np.where(fate < 0.8, mask, np.where(fate < 0.9, others, tokens[chosen]))
    targets = np.zeros(len(tokens), dtype=np.bool_)
    targets[chosen] = True
    return read, targets


def corrupt_spans(
    tokens: Tokens, counts: Flags, seed: int, *, share: float, mean_span: float, sentinels: Sequence[int]
) -> tuple[Tokens, Tokens, Flags]:
    """Replace random spans by sentinels, and ask for the spans.

    Args:
        tokens: int64 [n], n >= 2.
        counts: bool [n], which tokens may be targets of the loss.
        seed: decides everything.
        share: of the tokens that go, in (0, 1).
        mean_span: mean length of a span, in tokens.
        sentinels: tokens that stand for the first, second... span; one more than there are spans
            is used, and no more spans are made than there are sentinels for.

    Returns:
        What the encoder reads, int64 [m]; the answer, int64 [k]; which of it counts, bool [k].

    Source: Raffel et al. 2020, section 3.1.4.
    """
    generator = np.random.default_rng(seed)
    length = len(tokens)
    num_noise = min(max(round(share * length), 1), length - 1)
    num_spans = max(1, min(round(num_noise / mean_span), num_noise, length - num_noise, len(sentinels) - 1))
    hidden = _segments(num_noise, num_spans, generator)
    kept = _segments(length - num_noise, num_spans, generator)
    source: list[Tokens] = []
    answer: list[Tokens] = []
    flags: list[Flags] = []
    at = 0
    for number, (stay, go) in enumerate(zip(kept, hidden, strict=True)):
        sentinel = np.asarray([sentinels[number]], dtype=np.int64)
        source += [tokens[at : at + stay], sentinel]
        answer += [sentinel, tokens[at + stay : at + stay + go]]
        flags += [np.ones(1, dtype=np.bool_), counts[at + stay : at + stay + go]]
        at += stay + go
    end = np.asarray([sentinels[num_spans]], dtype=np.int64)
    return np.concatenate(source), np.concatenate([*answer, end]), np.concatenate([*flags, np.ones(1, dtype=np.bool_)])


def split_prefix(tokens: Tokens, counts: Flags, seed: int) -> tuple[Tokens, Tokens, Flags]:
    """Cut somewhere in the middle half: the encoder reads the first part, the decoder writes the second.

    Args:
        tokens: int64 [n], n >= 2.
        counts: bool [n], which tokens may be targets of the loss.
        seed: decides where.

    Returns:
        As `corrupt_spans`.

    Source: Liu et al. 2018, section 4.2; Raffel et al. 2020, section 3.2.3 (prefix language model).
    """
    length = len(tokens)
    low, high = max(1, length // 4), max(1, 3 * length // 4)
    cut = int(np.random.default_rng(seed).integers(low, high + 1))
    cut = min(cut, length - 1)
    return tokens[:cut], tokens[cut:], counts[cut:]


def _segments(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """Cut `total` into `parts` lengths of at least 1, each way equally likely."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.empty(0, np.int64)
    return [int(step) for step in np.diff(np.concatenate([[0], cuts, [total]]))]
