from __future__ import annotations

import pytest

from strategies.activations import ActivationCheckpointing
from trainer.commands.wanted import wanted_of
from trainer.config import compose
from trainer.planner import trace as tracing
from trainer.planner.layout import Layout
from trainer.planner.trace import Trace

SIX_LAYERS = [
    "strategy=ddp",
    "model=hf",
    "model.architecture=llama",
    "model.config={vocab_size: 512, hidden_size: 64, num_hidden_layers: 6, num_attention_heads: 4}",
    "data.length=64",
]


def traced(how: ActivationCheckpointing | None, *further: str) -> Trace:
    keys = [*SIX_LAYERS, *further]
    return wanted_of(keys, compose(keys), None).facts.trace(2, how)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_trace_of_blocks_that_are_alike_equals_that_of_all_blocks(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ActivationCheckpointing(every=every)
    short = traced(how)
    monkeypatch.setattr(tracing, "Layout", lambda model, blocks, most_alike: Layout(model, blocks, len(blocks)))
    whole = traced(how)
    assert len(short.forward) == len(whole.forward) == 13
    assert short.flops == whole.flops
    assert short.kept == whole.kept
    assert short.peak == whole.peak


def test_trace_counts_more_work_and_less_memory_the_more_blocks_are_computed_again() -> None:
    ways = [None, *(ActivationCheckpointing(every=every) for every in (3, 2, 1))]
    found = [traced(how) for how in ways]
    assert [each.flops for each in found] == sorted({each.flops for each in found})
    assert [each.kept for each in found] == sorted({each.kept for each in found}, reverse=True)


def test_trace_in_bf16_keeps_no_16_bit_weights_of_blocks_that_are_computed_again() -> None:
    six, twelve = (
        traced(ActivationCheckpointing(), "precision=bf16", f"model.config.num_hidden_layers={layers}")
        for layers in (6, 12)
    )
    between_blocks = 2 * 64 * 64 * 4  # samples, tokens, width, bytes of fp32
    assert 6 * between_blocks <= twelve.kept - six.kept <= 1.01 * 6 * between_blocks
