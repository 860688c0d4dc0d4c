"""Fully sharded data parallelism: each rank holds a part of weights, gradients and moments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from strategies._blocks import find_blocks, with_own_parameters
from strategies._fsdp_memory import cut, most_at_once
from strategies._torch import TorchStrategy, materialise
from strategies.backends import Backend, connect_ranks
from strategies.base import (
    Batch,
    Collective,
    Footprint,
    LossFunction,
    LossSum,
    ModelSpec,
    Plan,
    Weights,
    WorldSpec,
)
from strategies.errors import ConfigError
from strategies.world import Launch, World

if TYPE_CHECKING:  # imported late, since every start reads this file
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

_REPLICATE, _SHARD = "replicate", "shard"


class Sharding(Enum):
    """What is cut, and over whom."""

    full = "full"
    """Weights, gradients and moments over all ranks; a block is gathered for its forward and again for its backward."""
    grad_op = "grad_op"
    """The same, but a block stays gathered between forward and backward."""
    hybrid = "hybrid"
    """As full, inside groups of ranks; the groups hold the same, and average their gradients."""
    replicate = "replicate"
    """Nothing is cut."""


@final
@dataclass(kw_only=True)
class FSDPStrategy(TorchStrategy):
    """torch's `fully_shard`.

    Raises:
        ConfigError: a setting is out of range, or two contradict each other.
    """

    sharding: Sharding = Sharding.full
    shard_size: int | None = None
    """hybrid: ranks of one group, over which all is cut; null: those of one machine."""
    replicas: int | None = None
    """hybrid: the number of groups, instead of their size."""
    sharded_data_parallel_degree: int | None = None
    """hybrid: `shard_size` by the name that SageMaker's model parallel library 1 gave it."""
    hybrid_shard_degree: int | None = None
    """hybrid: `shard_size` by the name that SageMaker's model parallel library 2 gives it."""
    reshard_after_forward: int | None = None
    """Between forward and backward keep a block cut over this many neighbouring ranks, so that the second gathering
    stays among them; null: as `sharding` says."""
    wrap: list[str] = field(default_factory=list)
    """Class names of the blocks that are gathered one at a time; empty: those that the model names itself
    (`_no_split_modules`), else the members of its lists of modules."""
    wrap_parameters: int | None = None
    """Instead of `wrap`: the smallest modules with at least this many parameters."""
    prefetch: int = 1
    """Blocks that are gathered ahead of the one that computes."""
    cpu_offload: bool = False
    """Keep weights, gradients and moments in host memory, and step there."""
    reduce_every_micro_batch: bool = True
    """A rank adds up its part of the gradients; false: whole gradients, which take the memory of the whole model and
    are reduced once per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mesh: DeviceMesh | None = None
        self._parts: list[FSDPModule] = []
        self._used: set[str] = set()  # in this step, on this rank
        self._trained: dict[str, nn.Parameter] = {}
        self._statistics: list[Tensor] = []  # buffers that training changes
        self._refuse_out_of_range()

    def connect(self, backend: Backend) -> World:
        from torch.distributed.device_mesh import init_device_mesh

        launch = Launch.from_env()
        groups = self._groups(launch.size, launch.local_size)
        world = connect_ranks(backend)
        shape = {_REPLICATE: groups, _SHARD: launch.size // groups}
        if self.sharding in (Sharding.full, Sharding.grad_op):
            del shape[_REPLICATE]
        self._mesh = init_device_mesh(world.device.type, (*shape.values(),), mesh_dim_names=(*shape,))
        self._world = world
        return world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        number = plan.precision.master_dtype.itemsize
        groups = self._groups(world.size, world.local_size)
        ranks = world.size // groups
        parts = cut(model, ranks, self.wrap, self.wrap_parameters)
        weights, gradients = (numbers * number // ranks for numbers in (parts.weights, parts.gradients))
        moments = int(gradients * model.slots_per_parameter)
        kept = 1.0 if self.sharding is Sharding.grad_op else 1 / (self.reshard_after_forward or math.inf)
        buffers = most_at_once(parts, ranks=ranks, prefetch=self.prefetch, kept=kept)
        if plan.accumulation > 1 and not self.reduce_every_micro_batch:
            buffers += parts.gradients - parts.gradients // ranks  # whole until they are parts
        return Footprint(
            weights_bytes=weights,
            gradients_bytes=gradients,
            moments_bytes=moments,
            activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
            buffers_bytes=buffers * number,
            collectives=self._collectives(model, plan, groups, ranks),
            host_bytes=weights + gradients + moments if self.cpu_offload else 0,
        )

    def _collectives(self, model: ModelSpec, plan: Plan, groups: int, ranks: int) -> tuple[Collective, ...]:
        number = plan.precision.master_dtype.itemsize
        weights, gradients = model.num_parameters * number, model.num_trainable * number
        gathers = plan.accumulation * (1 if self.sharding is Sharding.grad_op else 2)
        reductions = plan.accumulation if self.reduce_every_micro_batch else 1
        found = []
        if ranks > 1:
            found = [
                Collective(kind="all_gather", payload_bytes=weights, count=gathers, ranks=ranks),
                Collective(kind="reduce_scatter", payload_bytes=gradients, count=reductions, ranks=ranks),
            ]
        if groups > 1:
            found.append(Collective(kind="all_reduce", payload_bytes=gradients // ranks, count=1, ranks=groups))
        return tuple(found)

    def close(self) -> None:
        self._world = self._run = self._mesh = None
        self._parts, self._statistics, self._trained = [], [], {}
        if dist.is_initialized():
            dist.destroy_process_group()

    # What TorchStrategy asks for.

    def init_context(self, plan: Plan) -> contextlib.AbstractContextManager[Any]:
        return torch.device("meta") if plan.deferred else contextlib.nullcontext()

    def _placed(self, model: nn.Module, weights: Weights, plan: Plan) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

        device = self._connected.device
        for name, value in model.named_parameters():
            if value.ndim == 0:
                raise ConfigError(
                    f"FSDPStrategy: the parameter {name!r} is a single number, which can't be cut. "
                    "Make it a vector of one (model), or use strategy=ddp (strategy)."
                )
        blocks = find_blocks(model, self.wrap, self.wrap_parameters)
        if plan.activation_checkpointing is not None:
            plan.activation_checkpointing.apply(blocks)
        if plan.compile:  # what fully_shard hangs around a block stays outside
            for block in blocks or [model]:
                block.forward = torch.compile(block.forward)
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if self.cpu_offload else OffloadPolicy()
        reshard = self.reshard_after_forward or self.sharding is not Sharding.grad_op
        blocks = with_own_parameters(model, blocks)  # what is tied has to be gathered together: with the rest
        for part in (*blocks, model):
            part.register_forward_hook(_own_output)
        for block in blocks:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=reshard, offload_policy=offload)
        fully_shard(model, mesh=self._mesh, reshard_after_forward=False, offload_policy=offload)
        assert isinstance(model, FSDPModule)
        model.set_reduce_scatter_unused_params(True)  # else ranks that use different ones send different lengths
        self._parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self._prefetch([part for part in blocks if isinstance(part, FSDPModule)])
        model = materialise(model, weights, torch.device("cpu") if self.cpu_offload else device, plan.precision)
        if self.cpu_offload:  # what isn't cut isn't brought along for the forward pass
            for part in model.modules():
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = buffer.to(device)
        self._note_use(model)
        has_statistics = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
        self._statistics = list(model.buffers()) if has_statistics else []
        return model

    def _note_use(self, model: nn.Module) -> None:
        """Hear of each gradient on this rank, at the tensors into which parameters are gathered time and again."""
        self._used.clear()
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

        def gathered(module: nn.Module, args: Any) -> None:
            for name, value in module.named_parameters(prefix=names[module]):
                if value.requires_grad and not hasattr(value, "placements"):
                    value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        lambda _, name=name: self._used.add(name)
                    )
            handles.pop(module).remove()  # once is enough

        parts = set(self._parts)
        names = {module: name for name, module in model.named_modules() if module in parts}
        handles = {module: module.register_forward_pre_hook(gathered) for module in names}

    def _prefetch(self, blocks: Sequence[FSDPModule]) -> None:
        """Explicitly, where it is more than what torch does anyway."""
        for index, block in enumerate(blocks if self.prefetch > 1 else ()):
            block.set_modules_to_forward_prefetch(list(blocks[index + 1 : index + 1 + self.prefetch]))
            block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, index - self.prefetch) : index])))

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model

    def _bare(self, model: nn.Module) -> nn.Module:
        return model

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        root = self._parts[0]
        if self._set_up.plan.accumulation > 1:
            root.set_is_last_backward(last)
            root.set_requires_gradient_sync(last or self.reduce_every_micro_batch)
            root.set_requires_all_reduce(last)
        for buffer in self._statistics:  # of rank 0, as under ddp: what is evaluated and saved is one model
            dist.broadcast(buffer, 0)
        try:
            yield
        except BaseException:
            root.reset_iter_state()
            raise

    def evaluate(self, model: nn.Module, batch: Batch, loss_function: LossFunction) -> LossSum:
        try:
            return super().evaluate(model, batch, loss_function)
        finally:
            self._cut_again()

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        try:
            return super().predict(model, batch)
        finally:
            self._cut_again()

    def _cut_again(self) -> None:
        """No backward pass follows that would do it."""
        for part in self._parts:
            part.reshard()

    def _global_norm(self, norm: Tensor) -> Tensor:
        """Also takes the zeros away that were reduced for what no rank has used; a rank that used all needn't know."""
        world, missing = self._connected, len(self._used) < len(self._trained)
        told = torch.ones(1 + len(self._trained), device=world.device, dtype=torch.float64)
        if missing:
            told[1:] = torch.tensor([name in self._used for name in self._trained])
        told[0] = norm.to(world.device, torch.float64).square() / self._groups(world.size, world.local_size)
        dist.all_reduce(told)
        if missing:
            for value, count in zip(self._trained.values(), told[1:].tolist(), strict=True):
                value.grad = value.grad if count else None
        self._used.clear()
        return told[0].sqrt().to(norm.device, norm.dtype)

    def _communication_s(self, model: nn.Module) -> float | None:
        return None

    # Settings.

    def _refuse_out_of_range(self) -> None:
        hybrid = {
            "shard_size": self.shard_size,
            "replicas": self.replicas,
            "sharded_data_parallel_degree": self.sharded_data_parallel_degree,
            "hybrid_shard_degree": self.hybrid_shard_degree,
        }
        given = {key: value for key, value in hybrid.items() if value is not None}
        for key, value in given.items():
            if self.sharding is not Sharding.hybrid:
                raise ConfigError(
                    f"FSDPStrategy: {key}={value} means nothing with sharding={self.sharding.name}. "
                    f"Leave it out, or use strategy=fsdp_hybrid (strategy.{key})."
                )
            if value < 1:
                raise ConfigError(f"FSDPStrategy: {key}={value} is below 1. Count ranks (strategy.{key}).")
        if len(given) > 1:
            raise ConfigError(
                f"FSDPStrategy: {' and '.join(given)} say the same thing in different words. "
                f"Give one of them ({', '.join(f'strategy.{key}' for key in given)})."
            )
        if self.wrap and self.wrap_parameters is not None:
            raise ConfigError(
                "FSDPStrategy: wrap and wrap_parameters both say what a block is. "
                "Give one of them (strategy.wrap, strategy.wrap_parameters)."
            )
        for key, least in (("wrap_parameters", 1), ("prefetch", 1), ("reshard_after_forward", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"FSDPStrategy: {key}={value} is below {least}. Raise it (strategy.{key}).")
        if self.reshard_after_forward is not None and self.sharding in (Sharding.grad_op, Sharding.replicate):
            raise ConfigError(
                f"FSDPStrategy: reshard_after_forward={self.reshard_after_forward} contradicts "
                f"sharding={self.sharding.name}, which keeps blocks whole. Leave it out, or use strategy=fsdp_full "
                "(strategy.reshard_after_forward)."
            )

    def _groups(self, size: int, local_size: int) -> int:
        """How many groups hold the same.

        Raises:
            ConfigError: that many ranks can't be grouped so.
        """
        if self.sharding is not Sharding.hybrid:
            ranks = 1 if self.sharding is Sharding.replicate else size
        else:
            ranks = self._ranks_of_group(size, local_size)
        if (kept := self.reshard_after_forward) is not None and (ranks % kept or not 1 < kept < ranks):
            raise ConfigError(
                f"FSDPStrategy: reshard_after_forward={kept} doesn't divide the {ranks} ranks over which a block is "
                f"cut. Choose {_divisors(ranks)} (strategy.reshard_after_forward)."
            )
        return size // ranks

    def _ranks_of_group(self, size: int, local_size: int) -> int:
        given = self.shard_size or self.sharded_data_parallel_degree or self.hybrid_shard_degree
        if self.replicas is not None:
            if size % self.replicas:
                raise ConfigError(
                    f"FSDPStrategy: replicas={self.replicas} doesn't divide the {size} ranks of this run. "
                    f"Choose {_divisors(size, whole=True)} (strategy.replicas)."
                )
            return size // self.replicas
        ranks = given or local_size
        if size % ranks:
            what = "shard_size" if given else "ranks of a machine: shard_size"
            raise ConfigError(
                f"FSDPStrategy: {what}={ranks} doesn't divide the {size} ranks of this run. "
                f"Choose {_divisors(size, whole=True)} (strategy.shard_size)."
            )
        return ranks


def _own_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Of a part that ends in a view (a `nn.Linear` with a bias does): an in-place operation on a view would lose the
    hook that gathers the part's weights for its backward pass.
    """
    return tree_map_only(Tensor, lambda value: value.clone() if value._is_view() else value, output)


def _divisors(number: int, *, whole: bool = False) -> str:
    """For people: the divisors of `number`, itself and 1 among them if `whole`."""
    found = [each for each in range(1, number + 1) if number % each == 0 and (whole or 1 < each < number)]
    return " or ".join(map(str, found)) if found else "another number of ranks"
