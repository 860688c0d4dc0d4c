"""What a strategy predicts of its memory, held against what its tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from strategies import _testing_model as little
from strategies.backends import GlooBackend
from strategies.base import Footprint, ModelSpec, NamedParameters, Plan, Strategy, WorldSpec
from strategies.ddp import DDPStrategy
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.single import SingleStrategy
from strategies.testing import Workers
from strategies.world import World

HYBRID = {"sharding": Sharding.hybrid, "shard_size": 2}


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        down: Tensor = self.down(self.up(self.norm(hidden)).relu())
        return hidden + down


class Uneven(nn.Module):
    """Blocks of several sizes, rows that no number of ranks divides, a tied embedding, and a frozen part."""

    def __init__(self, width: int = 121, inner: tuple[int, ...] = (500, 301, 701, 400, 499)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, width)
        self.layers = nn.ModuleList([Layer(width, each) for each in inner])
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


WHOLE = sum(value.numel() * 4 for value in Uneven().parameters())


def adamw(named: NamedParameters) -> AdamW:
    return AdamW([value for _, value in named], lr=1e-3)


def step(strategy: Strategy, model: nn.Module, plan: Plan) -> None:
    batches = [little.make_batch(range(1)) for _ in range(plan.accumulation)]
    strategy.forward_backward(model, batches, lambda outputs, batch: little.loss(outputs, batch), 6.0)


def held(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind them: padding counts, what two share counts once."""
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def held_and_predicted(cls: type[Strategy], settings: dict[str, Any]) -> tuple[list[int], Footprint]:
    """Bytes of weights, gradients and moments after a step on this rank, and what was predicted."""
    strategy = cls(**settings)
    world = strategy.connect(GlooBackend())
    plan = Plan(micro_batch=1)
    spec = ModelSpec.of(Uneven())
    predicted = strategy.footprint(spec, WorldSpec(size=world.size, local_size=world.local_size), plan)
    model, optimizer = strategy.setup(Uneven(), little.weights(False), adamw, plan)
    step(strategy, model, plan)
    gradients = held([value.grad for value in model.parameters() if value.grad is not None])
    strategy.step(model, optimizer)
    moments = [value for slots in optimizer.state.values() for value in slots.values() if value.ndim]
    found = [held(list(model.parameters())), gradients, held(moments)]
    strategy.close()
    return found, predicted


@pytest.mark.parametrize(
    ("size", "cls", "settings", "share"),
    [
        *((size, FSDPStrategy, {}, 1 / size) for size in (2, 3, 4)),
        *((size, FSDPStrategy, {"sharding": Sharding.grad_op}, 1 / size) for size in (2, 3, 4)),
        (4, FSDPStrategy, HYBRID, 1 / 2),
        (4, FSDPStrategy, {"reshard_after_forward": 2}, 1 / 4),
        (2, FSDPStrategy, {"cpu_offload": True}, 1 / 2),
        (3, FSDPStrategy, {"wrap": ["Linear"]}, 1 / 3),
        (2, FSDPStrategy, {"sharding": Sharding.replicate}, 1),
        (2, DDPStrategy, {}, 1),
        (1, SingleStrategy, {}, 1),
    ],
)
def test_model_state_takes_its_share_and_what_is_predicted(
    workers: Workers, size: int, cls: type[Strategy], settings: dict[str, Any], share: float
) -> None:
    trained = WHOLE - sum(value.numel() * 4 for value in Uneven().layers[1].parameters())
    answers = workers.run(held_and_predicted, size, cls, settings)
    predicted = answers[0][1]
    for kinds, _ in answers:  # where rows don't divide, the last rank's moments are a little smaller
        assert sum(kinds) <= 1.05 * share * (WHOLE + 3 * trained)
    largest = [max(each) for each in zip(*(kinds for kinds, _ in answers), strict=True)]
    wanted = (predicted.weights_bytes, predicted.gradients_bytes, predicted.moments_bytes)
    assert largest == pytest.approx(wanted, rel=0.02)
    assert predicted.host_bytes == (sum(wanted) if "cpu_offload" in settings else 0)


def peak_and_predicted(cls: type[Any], settings: dict[str, Any], size: int) -> tuple[int, int]:
    """Bytes that a later step takes at its peak beyond weights and moments, and those predicted; on rank 0.

    Gloo's threads keep buffers a moment longer, now this one and now that, so nothing is sent.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.profiler import ProfilerActivity, profile
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

    strategy = cls(**settings)
    dist.init_process_group("fake", rank=0, world_size=size, store=dist.HashStore())
    strategy._world = World(
        size=size, local_size=size, data_size=size, device=torch.device("cpu"), store=dist.HashStore()
    )
    if cls is FSDPStrategy:
        groups = strategy._groups(size, size)
        shape = {"shard": size} if groups == 1 else {"replicate": groups, "shard": size // groups}
        strategy._mesh = init_device_mesh("cpu", (*shape.values(),), mesh_dim_names=(*shape,))
    plan = Plan(micro_batch=1, accumulation=2)
    world = WorldSpec(size=size, local_size=size)
    blocks = Uneven(120, (504, 304, 704, 400, 496))  # on CPU torch pads others once more, in a copy
    predicted = strategy.footprint(ModelSpec.of(blocks), world, plan)
    model, optimizer = strategy.setup(blocks, little.weights(False), adamw, plan)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step(strategy, model, plan)
        strategy.step(model, optimizer)
    total = most = 0
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    strategy.close()
    return most, predicted.gradients_bytes + predicted.buffers_bytes


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {}),
        (8, {}),
        (4, {"prefetch": 2}),
        (4, {"wrap": ["Linear"]}),
        (4, {"sharding": Sharding.grad_op}),
        (4, HYBRID),
        (4, {"reshard_after_forward": 2}),
        (2, {"sharding": Sharding.replicate}),
    ],
)
def test_peak_of_a_step_is_what_is_predicted(workers: Workers, size: int, settings: dict[str, Any]) -> None:
    [(most, predicted)] = workers.run(peak_and_predicted, 1, FSDPStrategy, settings, size)
    assert most == pytest.approx(predicted, rel=0.05)  # a few activations come on top


def test_peak_of_gradients_kept_whole_is_at_most_what_is_predicted(workers: Workers) -> None:
    settings = {"reduce_every_micro_batch": False}
    [(most, predicted)] = workers.run(peak_and_predicted, 1, FSDPStrategy, settings, 4)
    assert 0.8 * predicted < most < 1.02 * predicted


def test_outline_has_the_same_parts_and_no_storage() -> None:
    model = Uneven()
    outline = ModelSpec.of(model).outline
    assert outline is not None
    assert [(name, type(part)) for name, part in outline.named_modules()] == [
        (name, type(part)) for name, part in model.named_modules()
    ]
    assert [(name, value.shape, value.requires_grad) for name, value in outline.named_parameters()] == [
        (name, value.shape, value.requires_grad) for name, value in model.named_parameters()
    ]
    assert all(value.is_meta for value in outline.parameters())
    assert not any(value.is_meta for value in model.parameters())
