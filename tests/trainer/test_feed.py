"""What all ranks agree on before a step, and how seldom they need to talk for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from strategies.backends import GlooBackend, connect_ranks
from strategies.base import Batch
from strategies.testing import Workers
from trainer.feed import AT_ONCE_S, Feed
from trainer.stop import StopRequest


def batches() -> Iterator[list[Batch]]:
    """Steps of two micro-batches, whose counts tell rank and step."""
    rank = int(os.environ["RANK"])
    for step in range(1000):
        yield [
            Batch(inputs={}, labels=torch.zeros(1), num_targets=100 * step + 10 * rank + part, num_tokens=step)
            for part in (0, 1)
        ]


def take(
    most: int, step_s: float, num_steps: int, *, wish_at: int | None = None, signal_at: int | None = None,
    leaders: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Steps that this rank saw until a stop, and how many messages it took."""
    world, clock = connect_ranks(GlooBackend()), [0.0]
    world = replace(world, data_leader=leaders or world.rank == 0)
    request = StopRequest(None)
    feed = Feed(batches(), world, request, now=lambda: clock[0])
    found: dict[str, Any] = {"targets": [], "tokens": [], "stop": None, "interrupted": None}
    with mock.patch.object(type(world), "reduce", autospec=True, side_effect=type(world).reduce) as reduce:
        for count in range(num_steps):
            left = most - count % most
            wish = "enough" if count == wish_at and world.rank == 1 else None
            if count == signal_at and world.rank == 1:
                request.signal = signal.SIGTERM
            step = feed.next(wish, left)
            clock[0] += step_s
            if step.stop is not None:
                found |= {"stop": step.stop, "interrupted": step.interrupted, "at": count}
                break
            found["targets"].append(step.targets)
            found["tokens"].append(step.tokens)
            found["mine"] = [batch.num_targets for batch in step.batches]
        found["messages"] = reduce.call_count
    dist.destroy_process_group()
    return found


def expected(num_steps: int) -> list[float]:
    return [sum(100 * step + 10 * rank + part for rank in (0, 1) for part in (0, 1)) for step in range(num_steps)]


@pytest.mark.parametrize(("most", "step_s", "most_messages"), [(1, 0.001, 40), (10, 0.001, 7), (10, 10.0, 40)])
def test_next_gives_each_step_once_with_its_counts(
    workers: Workers, most: int, step_s: float, most_messages: int
) -> None:
    for found in workers.run(take, 2, most, step_s, 40):
        assert found["targets"] == [max(value, 1.0) for value in expected(40)]
        assert found["tokens"] == [4 * step for step in range(40)]
        assert found["messages"] <= most_messages
        assert (found["messages"] == 40) == (most_messages == 40)


def test_next_agrees_on_no_more_than_a_stop_may_wait(workers: Workers) -> None:
    step_s = AT_ONCE_S / 5
    [first, second] = workers.run(take, 2, 1000, step_s, 100)
    assert first["messages"] == second["messages"] == pytest.approx(100 / 5, abs=3)


def take_with_wish(wish_at: int) -> dict[str, Any]:
    return take(10, 0.001, 40, wish_at=wish_at)


def take_with_signal(signal_at: int, leaders: bool) -> dict[str, Any]:
    return take(10, 0.001, 40, signal_at=signal_at, leaders=leaders)


def test_next_wish_of_one_rank_ends_all_before_the_same_step(workers: Workers) -> None:
    for found in workers.run(take_with_wish, 2, 20):
        assert (found["stop"], found["interrupted"], found["at"]) == ("enough", False, 20)


@pytest.mark.parametrize("leaders", [True, False])
def test_next_signal_of_one_rank_ends_all_before_the_same_step(workers: Workers, *, leaders: bool) -> None:
    both = workers.run(take_with_signal, 2, 13, leaders)
    for found in both:
        assert (found["stop"], found["interrupted"]) == ("stopped by SIGTERM", True)
        assert found["at"] == both[0]["at"]
        assert 13 <= found["at"] <= 20
