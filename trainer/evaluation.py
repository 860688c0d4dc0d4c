"""Losses and metrics over the validation samples, exact however they are split over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from strategies.base import Batch, LossFunction, Strategy
from strategies.world import World
from trainer.stop import StopRequest


def evaluate_batches(
    strategy: Strategy, model: torch.nn.Module, world: World, batches: Iterable[Batch], loss_function: LossFunction
) -> dict[str, float]:
    """The loss per counted position, and each metric as the ratio of its sums. Collective.

    Args:
        strategy: of `model`.
        model: from the strategy's `setup`.
        world: over which the sums go.
        batches: this rank's; equally many on every rank.
        loss_function: token-summed, with the metrics in its terms.

    Returns:
        `loss` and the metrics by name; NaN where nothing counted.
    """
    # fp64 on the host's device: a few numbers per batch, added there, read once.
    wide = torch.float64 if world.device.type != "mps" else torch.float32
    total, targets = torch.zeros((), dtype=wide, device=world.device), 0
    ratios: dict[str, Tensor] = {}
    for batch in batches:
        sums = strategy.evaluate(model, batch.to(world.device), loss_function)
        total = total + sums.loss.to(wide)
        targets += sums.num_targets
        for name, pair in sums.metrics.items():
            found = torch.stack([part.to(wide) for part in pair])
            ratios[name] = ratios[name] + found if name in ratios else found
    names = sorted(ratios)
    mine = [float(total), float(targets), *(value for name in names for value in ratios[name].tolist())]
    loss, count, *rest = world.reduce(mine)
    return {"loss": loss / count if count else math.nan, **as_ratios(names, rest)}


class EvaluationStopped(Exception):  # noqa: N818
    """Some rank was told to stop; raised on all before the same batch."""


def until_stopped(batches: Iterable[Batch], world: World, request: StopRequest) -> Iterator[Batch]:
    """`batches`, unless a rank is told to stop. Collective; one message per batch, which no batch waits for.

    Raises:
        EvaluationStopped: a rank was told to stop, or is out of time.
    """
    answer = None
    for batch in batches:
        if answer is not None and any(answer()):
            raise EvaluationStopped
        answer = world.reduce_later([request.signal != 0, request.out_of_time()], "max")
        yield batch
    if answer is not None:
        answer()


def as_ratios(names: list[str], sums: list[float]) -> dict[str, float]:
    """`names[i]` -> sums[2 i] / sums[2 i + 1]."""
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return {name: value / weight if weight else math.nan for name, (value, weight) in zip(names, pairs, strict=True)}
