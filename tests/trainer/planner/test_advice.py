"""Advice where nothing fits: each change is applied as it is printed, and then something does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.planner.test_report import TINY, planned
from trainer.commands.wanted import applied, wanted_of
from trainer.config import composed, each_of
from trainer.planner.advice import Change, found
from trainer.planner.cluster import Cluster
from trainer.planner.search import Wanted, search

FULL = "trainer.activation_checkpointing=full"
NEAR = Cluster(instance="g5.48xlarge"), Cluster(instance="p4d.24xlarge")


def advised(*keys: str) -> list[Change]:
    wanted, machines, factors = planned(*keys)
    assert not any(it.fits for it in search(wanted, machines, factors)[0])

    def again(further: Sequence[str]) -> Wanted:
        changed = applied(keys, further)
        config, choices = composed(changed)
        return wanted_of(changed, config, machines, False, choices["strategy"])

    return found(
        wanted,
        machines,
        factors,
        optimizers={name: it.slots_per_parameter for name, it in each_of("optimizer").items()},
        clusters=dict(zip(("g5", "p4d"), NEAR, strict=True)),
        strategies=each_of("strategy"),
        again=again,
        length=int(next(key for key in keys if key.startswith("data.length=")).partition("=")[2]),
    )


EACH = os.environ.get("SHARDWRIGHT_PLANS") == "all"
"""Each case, not the first; they take seconds each."""

CASES = {  # keys of a job, others with which it takes less, and how changes begin that are to be among the advice
    "a_strategy_that_keeps_everything": (
        ("strategy=ddp", "trainer.micro_batch=1", FULL),
        ("strategy=fsdp_full",),
        ("strategy=fsdp_full", "cluster=g5 "),
    ),
    "moments_too_large": (("strategy=ddp", "trainer.micro_batch=1", FULL), ("optimizer=adafactor",), ("optimizer=",)),
    "activations_too_large": (
        ("data.length=1024", "strategy=ddp", "trainer.micro_batch=2", "trainer.global_batch=32",
         "trainer.activation_checkpointing=none"),
        (FULL,),
        ("trainer.activation_checkpointing=full", "trainer.micro_batch=1", "data.length=512"),
    ),
    "logits_too_large": (
        ("data.length=2048", "strategy=fsdp_full", "trainer.micro_batch=2", "model.config.vocab_size=4096", FULL),
        ("model.loss_chunk=1024",),
        ("model.loss_chunk=1024", "data.length="),
    ),
    "too_few_machines": (
        ("strategy=fsdp_full", "trainer.micro_batch=1", "model.config.num_hidden_layers=8", FULL),
        ("cluster.nodes=2",),
        ("cluster.nodes=2",),
    ),
}  # fmt: skip


def least(*keys: str) -> int:
    wanted, machines, factors = planned(*keys)
    return min(it.memory.in_use for it in search(wanted, machines, factors)[0])


def too_large(given: Sequence[str], smaller: Sequence[str]) -> list[str]:
    """Keys of a job for devices that are too small for it, and large enough with some others."""
    names = {word.partition("=")[0] for word in given}
    keys = [*(key for key in TINY if key.partition("=")[0] not in names), *given]
    small, large = least(*applied(applied(keys, [FULL]), smaller)), least(*applied(keys, [FULL]))
    if FULL in smaller:
        large = least(*keys)
    return [*keys, f"cluster.memory_gib={(small + large) / 2 / 2**30:.9f}"]


@pytest.mark.parametrize("name", CASES if EACH else [*CASES][:1])
def test_changes_applied_as_printed_fit_and_are_sorted_by_cost(name: str) -> None:
    given, smaller, expected = CASES[name]
    keys = too_large(given, smaller)
    advice = advised(*keys)
    words = [change.words for change in advice]
    for start in expected:
        assert any(word.startswith(start) for word in words), (start, words)
    costs = [change.cost for change in advice]
    assert costs == sorted(costs)
    for change in advice:
        wanted, machines, factors = planned(*applied(keys, change.words.split()))
        best = search(wanted, machines, factors)[0][0]
        assert best.fits, change.words
        assert best.memory.total == change.best.memory.total, change.words


def test_changes_are_lines_with_memory_and_price() -> None:
    wanted, machines, factors = planned(*TINY, "strategy=ddp", "cluster.memory_gib=0.0005", "trainer.micro_batch=1")
    said = [str(it) for it in found(wanted, machines, factors, optimizers={}, clusters={"g5": NEAR[0]})]
    [line] = [each for each in said if each.startswith("cluster=g5 cluster.nodes=1: ")]
    assert "GiB with ddp" in line
    assert "16.29 USD/h" in line


def test_machines_at_hand_come_first_where_their_price_is_not_known() -> None:
    keys = too_large(*CASES["a_strategy_that_keeps_everything"][:2])
    wanted, machines, factors = planned(*keys)
    given: dict[str, Any] = {"optimizers": {}, "strategies": each_of("strategy")}
    clusters = {"g5": NEAR[0]}
    priced = found(wanted, machines, factors, clusters=clusters, **given)
    assert priced[0].words.startswith("cluster=g5 "), "it is cheaper than the p5 at hand"
    first, *others = found(wanted, replace(machines, price_per_h=None), factors, clusters=clusters, **given)
    assert first.words.startswith("strategy=")
    assert "USD" not in str(first)
    assert any(each.words.startswith("cluster=g5 ") for each in others)
