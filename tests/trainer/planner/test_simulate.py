"""What strategies predict of a step's collectives, held against those that one process starts as rank 0 of many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from strategies.activations import ActivationCheckpointing
from strategies.base import Batch, Collective, LossTerms, ModelSpec, Plan, Strategy, WorldSpec
from strategies.ddp import CommunicationHook, DDPStrategy
from strategies.deepspeed import DeepSpeedStrategy
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.precision import Numbers, Precision
from strategies.simulated import SimulatedBackend
from strategies.single import SingleStrategy
from tests.strategies.test_footprint import Layer
from trainer.planner.simulate import gradient_order, simulated

TOKENS = torch.arange(8).reshape(2, 4)
BATCH = Batch(inputs={"tokens": TOKENS}, labels=TOKENS, num_targets=8)
FSDP = {each: FSDPStrategy(sharding=each) for each in Sharding}


class Normed(nn.Module):
    """Blocks with statistics, some of them counts, between a head and an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 20)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20)) for _ in range(3))
        self.head = nn.Linear(20, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens.flatten())
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits.unflatten(0, tokens.shape)


class Little(nn.Module):
    """Blocks of several sizes, rows that no number of ranks divides, a tied embedding, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 21)
        self.layers = nn.ModuleList(Layer(21, inner) for inner in (50, 31, 71))
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(21, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def thawed() -> nn.Module:
    """Backward ends at the third block, which is the last one."""
    model = Little()
    model.requires_grad_(False)
    model.layers[2].requires_grad_(True)
    return model


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Bare(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(input_ids=tokens, use_cache=False).logits

    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Bare(config)


def loss(outputs: Tensor, batch: Batch) -> LossTerms:
    return LossTerms(loss=functional.cross_entropy(outputs.flatten(0, 1), batch.labels.flatten(), reduction="sum"))


def seen(
    strategy: Strategy,
    size: int,
    make: Callable[[], nn.Module] = Little,
    local_size: int = 8,
    stored: bool = True,
    **plan: Any,
) -> set[Collective]:
    world = WorldSpec(size=size, local_size=local_size)
    return set(simulated(strategy, make, BATCH, loss, world, Plan(micro_batch=2, **plan), stored=stored))


@functools.cache
def order(make: Callable[[], nn.Module], numbers: Numbers) -> tuple[str, ...]:
    return gradient_order(make, BATCH, loss, Precision(numbers=numbers))


def predicted(
    strategy: Strategy, size: int, make: Callable[[], nn.Module] = Little, local_size: int = 8, **plan: Any
) -> set[Collective]:
    with torch.device("meta"):
        model = make()
    how = Plan(micro_batch=2, **plan)
    spec = ModelSpec.of(model, gradient_order=order(make, how.precision.numbers))
    return set(strategy.footprint(spec, WorldSpec(size=size, local_size=local_size), how).collectives)


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (64, 2), (512, 1), (512, 2)])
@pytest.mark.parametrize(
    "strategy",
    [
        DDPStrategy(bucket_mb=0.01),
        FSDP[Sharding.full],
        FSDP[Sharding.grad_op],
        FSDP[Sharding.hybrid],
        FSDP[Sharding.replicate],
    ],
)
def test_collectives_of_a_step_are_those_predicted(strategy: Strategy, size: int, accumulation: int) -> None:
    found = seen(strategy, size, accumulation=accumulation)
    assert found
    assert found == predicted(strategy, size, accumulation=accumulation)


@pytest.mark.parametrize(
    ("strategy", "make", "size", "plan"),
    [
        (DDPStrategy(), llama, 64, {}),
        (DDPStrategy(bucket_mb=0.01), llama, 64, {}),
        (DDPStrategy(bucket_mb=0.01, find_unused=True), llama, 8, {}),
        (DDPStrategy(bucket_mb=0.01), Normed, 8, {"accumulation": 2}),
        (DDPStrategy(bucket_mb=0.01, broadcast_buffers=True), llama, 8, {}),
        (DDPStrategy(bucket_mb=0.01, hook=CommunicationHook.fp16), Little, 8, {}),
        (DDPStrategy(bucket_mb=0.01, hook=CommunicationHook.powersgd, powersgd_start=2), Little, 8, {}),
        (DDPStrategy(bucket_mb=0.01), Little, 8, {"precision": Precision(numbers=Numbers.fp64)}),
        (DDPStrategy(bucket_mb=0.01), llama, 8, {"precision": Precision(numbers=Numbers.bf16)}),
        (DDPStrategy(bucket_mb=0.01), Little, 8, {"precision": Precision(numbers=Numbers.tf32), "compile": True}),
        (FSDPStrategy(), Little, 8, {"precision": Precision(numbers=Numbers.fp16)}),
        (FSDPStrategy(), llama, 64, {"clip_norm": 1.0, "precision": Precision(numbers=Numbers.bf16)}),
        (FSDPStrategy(), llama, 8, {"activation_checkpointing": ActivationCheckpointing(keep=("aten.mm",))}),
        (FSDPStrategy(cpu_offload=True), Little, 8, {}),
        (FSDPStrategy(), Normed, 8, {"accumulation": 2}),
        (FSDPStrategy(), Normed, 8, {"precision": Precision(numbers=Numbers.fp64)}),
        (FSDPStrategy(), thawed, 8, {}),
        (FSDPStrategy(), thawed, 8, {"accumulation": 3}),
        (FSDPStrategy(prefetch=2), thawed, 8, {"accumulation": 2}),
        (FSDPStrategy(sharding=Sharding.grad_op), thawed, 8, {"accumulation": 2}),
        (FSDPStrategy(prefetch=3), Little, 8, {}),
        (FSDPStrategy(wrap=["Linear"]), Little, 8, {}),
        (FSDPStrategy(wrap_parameters=100_000), Little, 8, {}),
        (FSDPStrategy(reshard_after_forward=8), Little, 64, {"accumulation": 2}),
        (FSDPStrategy(reduce_every_micro_batch=False), Little, 8, {"accumulation": 2}),
        (FSDPStrategy(sharding=Sharding.hybrid, shard_size=16), Little, 64, {"accumulation": 2}),
        (FSDPStrategy(sharding=Sharding.hybrid, replicas=2), llama, 64, {}),
        (FSDPStrategy(sharding=Sharding.hybrid, reduce_every_micro_batch=False), Little, 64, {"accumulation": 2}),
        (FSDPStrategy(sharding=Sharding.hybrid), Little, 1024, {}),
        (DDPStrategy(bucket_mb=0.01), Little, 1024, {}),
    ],
)  # fmt: skip
def test_collectives_of_other_models_and_settings_are_those_predicted(
    strategy: Strategy, make: Callable[[], nn.Module], size: int, plan: dict[str, Any]
) -> None:
    found = seen(strategy, size, make, **plan)
    assert found
    assert found == predicted(strategy, size, make, **plan)


@pytest.mark.parametrize("numbers", [Numbers.fp32, Numbers.fp16])
@pytest.mark.parametrize("strategy", [DDPStrategy(bucket_mb=0.01), FSDP[Sharding.hybrid]])
def test_collectives_are_the_same_for_tensors_without_storage(strategy: Strategy, numbers: Numbers) -> None:
    precision = Precision(numbers=numbers)
    found = seen(strategy, 64, stored=False, clip_norm=1.0, precision=precision)
    assert found == predicted(strategy, 64, clip_norm=1.0, precision=precision)


def test_simulation_of_one_rank_hears_nothing() -> None:
    assert seen(SingleStrategy(), 1, local_size=1) == set()
    assert seen(DDPStrategy(), 1, local_size=1) == predicted(DDPStrategy(), 1, local_size=1) == set()


def test_simulation_catches_a_prediction_of_one_bucket_less_or_of_shorter_numbers() -> None:
    found = seen(DDPStrategy(bucket_mb=0.01), 8)

    def messages(collectives: set[Collective]) -> tuple[int, int]:
        counts = [(each.count, each.count * each.payload_bytes) for each in collectives]
        return sum(count for count, _ in counts), sum(size for _, size in counts)

    count, size = messages(found)
    fewer = predicted(DDPStrategy(bucket_mb=0.05), 8)
    assert messages(fewer) == (count - 1, size)
    shorter = predicted(DDPStrategy(bucket_mb=0.01, hook=CommunicationHook.fp16), 8)
    assert messages(shorter) == (count, size // 2)
    assert fewer != found != shorter


def test_hybrid_groups_are_told_apart_from_those_between_them() -> None:
    found = predicted(FSDP[Sharding.hybrid], 64)
    groups = {(each.kind, each.ranks, each.stride) for each in found if each.phase != "step"}
    assert groups == {("all_gather", 8, 1), ("reduce_scatter", 8, 1), ("all_reduce", 8, 8)}


def test_simulation_leaves_nothing_behind_where_the_loss_fails() -> None:
    def broken(outputs: Tensor, batch: Batch) -> LossTerms:
        raise ZeroDivisionError

    world = WorldSpec(size=8, local_size=8)
    with pytest.raises(ZeroDivisionError):
        simulated(FSDP[Sharding.full], Little, BATCH, broken, world, Plan(micro_batch=2))
    assert not dist.is_initialized()
    assert torch.ones(1).item() == 1.0


def test_simulation_of_a_strategy_with_a_library_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Simulation: DeepSpeedStrategy .*\(strategy\)\.$"):
        seen(DeepSpeedStrategy(), 8)


def test_simulation_of_what_needs_nccl_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hook=bf16 needs NCCL, and the backend is fake"):
        seen(DDPStrategy(hook=CommunicationHook.bf16), 8)
    assert not dist.is_initialized()


def test_simulated_backend_refuses_more_ranks_on_a_machine_than_there_are() -> None:
    with pytest.raises(ConfigError, match="9 ranks on a machine of 8 in all"):
        SimulatedBackend(size=8, local_size=9)
