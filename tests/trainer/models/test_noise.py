from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.models.noise import corrupt_spans, mask_tokens, split_prefix


def test_mask_tokens_hides_in_the_published_proportions() -> None:
    tokens = np.arange(100_000) % 50
    allowed = tokens != 7
    read, targets = mask_tokens(tokens, allowed, 3, share=0.15, mask=99, vocabulary_size=90)
    assert targets.sum() == round(0.15 * allowed.sum())
    assert not targets[tokens == 7].any()
    assert np.array_equal(read[~targets], tokens[~targets])
    assert np.mean(read[targets] == 99) == pytest.approx(0.8, abs=0.01)
    assert np.mean(read[targets] == tokens[targets]) == pytest.approx(0.1 + 0.1 / 90, abs=0.01)


def test_mask_tokens_is_a_function_of_the_seed() -> None:
    tokens = np.arange(40)
    allowed = np.ones(40, dtype=bool)
    one, two, other = (mask_tokens(tokens, allowed, s, share=0.5, mask=99, vocabulary_size=90) for s in (1, 1, 2))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[1], other[1])


def test_mask_tokens_with_nothing_allowed_has_no_target() -> None:
    read, targets = mask_tokens(np.arange(4), np.zeros(4, dtype=bool), 0, share=0.5, mask=9, vocabulary_size=8)
    assert read.tolist() == [0, 1, 2, 3]
    assert not targets.any()


@given(st.integers(2, 200), st.integers(0, 2**62), st.floats(0.01, 0.99), st.integers(2, 20))
def test_corrupt_spans_can_be_put_together_again(length: int, seed: int, share: float, num_sentinels: int) -> None:
    tokens = np.arange(length)
    sentinels = [1000 - number for number in range(num_sentinels)]
    counts = tokens % 3 != 0
    source, answer, counted = corrupt_spans(tokens, counts, seed, share=share, mean_span=3.0, sentinels=sentinels)
    spans: dict[int, list[int]] = {}
    for token in answer.tolist():
        if token > 900:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    again: list[int] = []
    for token in source.tolist():
        again += spans[token] if token > 900 else [token]
    assert again == tokens.tolist()
    used = [token for token in source.tolist() if token > 900]
    assert used == sentinels[: len(used)]
    assert answer[-1] == sentinels[len(used)]
    assert all(flag == (token > 900 or token % 3 != 0) for flag, token in zip(counted, answer, strict=True))


def test_corrupt_spans_hides_the_asked_share_in_spans_of_the_asked_length() -> None:
    tokens = np.arange(1000)
    source, _, _ = corrupt_spans(
        tokens, np.ones(1000, dtype=bool), 0, share=0.15, mean_span=3.0, sentinels=list(range(2000, 2100))
    )
    hidden = 1000 - int((source < 1000).sum())
    assert hidden == 150
    assert int((source >= 1000).sum()) == 50


@given(st.integers(2, 50), st.integers(0, 2**62))
def test_split_prefix_cuts_into_two_parts(length: int, seed: int) -> None:
    tokens, counts = np.arange(length), np.arange(length) % 2 == 0
    source, answer, counted = split_prefix(tokens, counts, seed)
    assert [*source, *answer] == tokens.tolist()
    assert min(len(source), len(answer)) >= 1
    assert np.array_equal(counted, counts[len(source) :])
