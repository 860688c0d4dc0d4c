from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.models.hf import HFModel
from trainer.models.initialise import DrawnOnCPU, initialise, put
from trainer.models.lora import LoRA

MakeTiny = Callable[..., HFModel]


def made(model: HFModel, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return model.make()


def filled(model: HFModel, seed: int) -> nn.Module:
    """As a strategy does it that builds without storage."""
    with torch.device("meta"):
        module = model.make()
    assert all(value.is_meta for value in module.parameters())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.fill_(3)  # whatever was in that memory
    torch.manual_seed(seed + 1)  # the global stream mustn't matter
    model.weights(seed).fill(module)
    return module


def values(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(one: nn.Module, two: nn.Module) -> None:
    left, right = values(one), values(two)
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("architecture", ["llama", "t5", "bert", "gpt2", "opt", "mixtral", "bloom", "mamba"])
def test_fill_of_a_model_built_without_storage_equals_make_bit_for_bit(tiny: MakeTiny, architecture: str) -> None:
    model = tiny(architecture)
    assert_same(made(model, 7), filled(model, 7))


@pytest.mark.parametrize("architecture", ["llama", "t5", "bert"])
def test_fill_of_a_class_that_a_strategy_has_made_equals_make(tiny: MakeTiny, architecture: str) -> None:
    model = tiny(architecture)
    with torch.device("meta"):
        module = model.make()
    for part in list(module.modules()):  # as `fully_shard` does it
        part.__class__ = type(f"Sharded{type(part).__name__}", (type(part),), {"__module__": "torch.distributed.fsdp"})
    module.to_empty(device="cpu")
    model.weights(7).fill(module)
    assert_same(made(model, 7), module)


def test_fill_with_adapters_equals_make_bit_for_bit(tiny: MakeTiny) -> None:
    model = tiny("llama", lora=LoRA(rank=2))
    assert_same(made(model, 7), filled(model, 7))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_make_depends_on_the_seed_alone(tiny: MakeTiny, architecture: str) -> None:
    model = tiny(architecture)
    assert_same(made(model, 3), made(tiny(architecture), 3))
    name = "lm_head.weight"
    assert not torch.equal(made(model, 3).state_dict()[name], made(model, 4).state_dict()[name])


@pytest.mark.parametrize(("architecture", "names"), [("gpt2", 2), ("t5", 4), ("bert", 2)])
def test_fill_ties_again_what_is_tied(tiny: MakeTiny, architecture: str, names: int) -> None:
    module = filled(tiny(architecture), 0)
    embedding = module.get_input_embeddings().weight
    shared = [name for name, value in module.named_parameters(remove_duplicate=False) if value is embedding]
    assert len(shared) == names


def test_fill_keeps_the_embedding_that_a_head_is_tied_to(tiny: MakeTiny) -> None:
    # The padding row is zero as an embedding, and would be random as a head.
    module = made(tiny("llama", config={"tie_word_embeddings": True}), 0)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.lm_head.weight[257].abs().max() == 0


def test_initialise_leaves_the_global_stream_alone(tiny: MakeTiny) -> None:
    module = made(tiny("llama"), 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialise(module, 1)
    assert torch.equal(torch.rand(3), expected)


def test_initialise_with_a_parameter_without_rule_is_refused(tiny: MakeTiny) -> None:
    module = made(tiny("llama"), 0)
    module.model.register_parameter("strange", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ConfigError, match=r"no rule for the first value of 'model\.strange'"):
        initialise(module, 0)


@pytest.fixture
def two_pretended_ranks() -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_pretended_ranks")
@pytest.mark.parametrize("architecture", ["llama", "t5", "bert", "roberta", "esm", "vit"])
def test_fill_of_a_sharded_model_gives_its_part_of_the_whole(tiny: MakeTiny, architecture: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = tiny(architecture)
    whole = made(model, 7)
    with torch.device("meta"):
        module = model.make()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    model.weights(7).fill(module)
    for (name, mine), value in zip(module.named_parameters(), whole.parameters(), strict=True):
        part = distribute_tensor(value, mesh, mine.placements, src_data_rank=None)  # type: ignore[attr-defined]
        assert torch.equal(mine.to_local(), part.to_local()), name  # type: ignore[attr-defined]


@pytest.mark.usefixtures("two_pretended_ranks")
def test_drawing_into_a_shard_gives_its_part_of_the_whole() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, empty

    mesh = init_device_mesh("cpu", (2,))
    shard = empty(5, 4, device_mesh=mesh, placements=[Shard(0)])
    torch.manual_seed(0)
    with DrawnOnCPU():
        nn.init.normal_(shard)
    torch.manual_seed(0)
    whole = torch.empty(5, 4).normal_()
    assert torch.equal(shard.to_local(), whole[3:])
    put(shard, torch.arange(20.0).view(5, 4))
    assert shard.to_local()[0].tolist() == [12.0, 13.0, 14.0, 15.0]
