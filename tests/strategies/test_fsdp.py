"""What is particular to FSDP: settings, what each rank holds, and fresh weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from strategies import _testing_model as little
from strategies._testing_jobs import Rig
from strategies._testing_model import Job
from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, ModelSpec, Plan, Strategy, WorldSpec
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.testing import Recipe, Workers


class Full(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"shard_size": 2}, "shard_size=2 means nothing with sharding=full"),
        ({"sharding": Sharding.grad_op, "hybrid_shard_degree": 2}, "hybrid_shard_degree=2 means nothing"),
        ({"sharding": Sharding.hybrid, "shard_size": 0}, "shard_size=0 is below 1"),
        ({"sharding": Sharding.hybrid, "shard_size": 2, "replicas": 2}, "shard_size and replicas say the same"),
        (
            {"sharding": Sharding.hybrid, "sharded_data_parallel_degree": 2, "hybrid_shard_degree": 2},
            "sharded_data_parallel_degree and hybrid_shard_degree say the same",
        ),
        ({"wrap": ["Layer"], "wrap_parameters": 10}, "wrap and wrap_parameters both"),
        ({"wrap_parameters": 0}, "wrap_parameters=0 is below 1"),
        ({"prefetch": 0}, "prefetch=0 is below 1"),
        ({"reshard_after_forward": 1}, "reshard_after_forward=1 is below 2"),
        ({"sharding": Sharding.grad_op, "reshard_after_forward": 2}, "contradicts sharding=grad_op"),
        ({"sharding": Sharding.replicate, "reshard_after_forward": 2}, "contradicts sharding=replicate"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        FSDPStrategy(**settings)
    assert "(strategy." in str(caught.value)


def refused(settings: dict[str, Any]) -> str:
    strategy = FSDPStrategy(**settings)
    try:
        strategy.connect(GlooBackend())
    except ConfigError as error:
        assert not torch.distributed.is_initialized(), "communication started before the refusal"
        return str(error)
    strategy.close()
    return ""


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sharding": Sharding.hybrid, "shard_size": 3}, "shard_size=3 doesn't divide the 4 ranks of this run"),
        ({"sharding": Sharding.hybrid, "replicas": 3}, "replicas=3 doesn't divide the 4 ranks of this run"),
        ({"reshard_after_forward": 3}, "Choose 2 (strategy.reshard_after_forward)"),
        ({"reshard_after_forward": 4}, "Choose 2 (strategy.reshard_after_forward)"),
    ],
)
def test_groups_that_the_ranks_cannot_form_are_refused(
    workers: Workers, settings: dict[str, Any], complaint: str
) -> None:
    heard = workers.run(refused, 4, settings)
    assert len(set(heard)) == 1
    assert complaint in heard[0]


def layout(settings: dict[str, Any]) -> list[int]:
    strategy = FSDPStrategy(**settings)
    strategy.connect(GlooBackend())
    assert strategy._mesh is not None
    found = [int(size) for size in strategy._mesh.shape]
    strategy.close()
    return found


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, [4]),
        ({"sharding": Sharding.grad_op}, [4]),
        ({"sharding": Sharding.hybrid}, [2, 2]),  # two machines of two ranks
        ({"sharding": Sharding.hybrid, "shard_size": 4}, [1, 4]),
        ({"sharding": Sharding.hybrid, "replicas": 4}, [4, 1]),
        ({"sharding": Sharding.hybrid, "sharded_data_parallel_degree": 2}, [2, 2]),
        ({"sharding": Sharding.hybrid, "hybrid_shard_degree": 1}, [4, 1]),
        ({"sharding": Sharding.replicate}, [4, 1]),
    ],
)
def test_groups_are_as_asked_for(workers: Workers, settings: dict[str, Any], shape: list[int]) -> None:
    assert workers.run(layout, 4, settings, local_size=2) == [shape] * 4


def between_steps(job: Job) -> list[bool]:
    """Whether parameters are cut after training, evaluation and prediction."""
    rig = Rig(Full, job)
    found = []
    for act in (lambda: rig.evaluate(100), lambda: rig.strategy.predict(rig.model, rig.batches(0)[0])):
        act()
        found.append(all(hasattr(value, "placements") for value in rig.model.parameters()))
    rig.strategy.close()
    return found


def test_parameters_are_cut_again_after_a_forward_pass_alone(workers: Workers) -> None:
    assert workers.run(between_steps, 2, Job()) == [[True, True]] * 2


def test_footprint_names_the_collectives_of_a_step() -> None:
    spec = ModelSpec.of(nn.Sequential(nn.ModuleList([nn.Linear(8, 8, bias=False)]), nn.Linear(8, 16, bias=False)))
    plan = replace(Plan(micro_batch=1), accumulation=3)

    def sent(**settings: Any) -> set[tuple[str, str, int, int, int]]:
        """Kind, phase, bytes, count and ranks."""
        found = FSDPStrategy(**settings).footprint(spec, WorldSpec(size=8, local_size=4), plan).collectives
        return {(each.kind, each.phase, each.payload_bytes, each.count, each.ranks) for each in found}

    block, rest, norm = 8 * 8 * 4, 8 * 16 * 4, ("all_reduce", "step", 3 * 8, 1, 8)
    forward = {("all_gather", "forward", size, 3, 8) for size in (block, rest)}
    again = ("all_gather", "backward", block, 3, 8)
    reduced = {("reduce_scatter", "backward", size, 3, 8) for size in (block, rest)}
    assert sent() == forward | reduced | {again, norm}
    once = {("reduce_scatter", "backward", size, 1, 8) for size in (block, rest)}
    assert sent(reduce_every_micro_batch=False) == forward | once | {again, norm}
    assert sent(sharding=Sharding.grad_op) == forward | reduced | {norm}
    assert sent(reshard_after_forward=2) == forward | reduced | {("all_gather", "backward", block, 3, 2), norm}
    within = {(kind, phase, size, 3, 4) for kind, phase, size, _, _ in {*forward, *reduced, again}}
    between = {("all_reduce", "backward", size // 4, 1, 2) for size in (block, rest)}
    assert sent(sharding=Sharding.hybrid) == within | between | {norm}
    whole = {("all_reduce", "backward", size, 1, 8) for size in (block, rest)}
    assert sent(sharding=Sharding.replicate) == whole | {norm}


class Viewed(nn.Module):
    """Its output is a view inside a dictionary, as of models of transformers with a bias in their head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(x)}


def in_place() -> list[float]:
    """Gradient norms of a loss that changes the outputs in place, and of one that doesn't."""
    strategy, norms = FSDPStrategy(), []
    world = strategy.connect(GlooBackend())
    plan = Plan(micro_batch=2)
    batch = Batch(inputs={"x": torch.ones(2, 3, 8)}, labels=torch.zeros(2, 3), num_targets=6)

    def loss(outputs: Any, batch: Batch) -> LossTerms:
        logits = outputs["logits"]
        return LossTerms(loss=(logits.mul_(3.0) if not norms else logits * 3.0).square().sum())

    for _ in range(2):
        torch.manual_seed(0)
        model, optimizer = strategy.setup(
            Viewed(), little.weights(False), lambda named: torch.optim.SGD([p for _, p in named], lr=0.1), plan
        )
        strategy.forward_backward(model, [batch], loss, float(6 * world.data_size))
        norms.append(float(strategy.step(model, optimizer).grad_norm))
    strategy.close()
    return norms


def test_model_that_ends_in_a_view_may_be_changed_in_place(workers: Workers) -> None:
    for changed, kept in workers.run(in_place, 2):
        assert changed == pytest.approx(kept)
        assert kept > 0
