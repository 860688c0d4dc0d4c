"""Fully sharded data parallelism: each rank holds a part of weights, gradients and moments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from strategies._fsdp_memory import cut, predicted
from strategies._fully_sharded import Shards, own_output
from strategies._torch import TorchStrategy, materialise
from strategies.backends import Backend, connect_ranks, disconnect_ranks, sharing_device
from strategies.base import (
    Batch,
    Footprint,
    LossFunction,
    LossSum,
    ModelSpec,
    Plan,
    Strategy,
    Weights,
    WorldSpec,
)
from strategies.blocks import find_blocks, with_own_parameters
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

    can_simulate = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mesh: DeviceMesh | None = None
        self._shards: Shards | None = None
        self._refuse_out_of_range()

    def connect(self, backend: Backend) -> World:
        from torch.distributed.device_mesh import init_device_mesh

        launch = backend.launch()
        groups = self._groups(launch.size, launch.local_size)
        world = connect_ranks(backend)
        shape = {_REPLICATE: groups, _SHARD: launch.size // groups}
        if self.sharding in (Sharding.full, Sharding.grad_op):
            del shape[_REPLICATE]
        with sharing_device():
            self._mesh = init_device_mesh(world.device.type, (*shape.values(),), mesh_dim_names=(*shape,))
        self._world = world
        return world

    def refuse_job(self, backend: Backend, launch: Launch, plan: Plan, model: ModelSpec) -> None:
        self._groups(launch.size, launch.local_size)
        if model.outline is not None:
            _refuse_single_numbers(model.outline)

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        if (outline := model.outline) is not None:
            model.once(_refuse_single_numbers, lambda: _refuse_single_numbers(outline))
        groups = self._groups(world.size, world.local_size)
        ranks = world.size // groups
        return predicted(
            model,
            plan,
            cut(model, ranks, self.wrap, self.wrap_parameters),
            ranks=ranks,
            groups=groups,
            prefetch=self.prefetch,
            kept=1.0 if self.sharding is Sharding.grad_op else 1 / (self.reshard_after_forward or math.inf),
            reduce_every=self.reduce_every_micro_batch,
            on_host=self.cpu_offload,
        )

    def variants(self, world: WorldSpec) -> Iterable[tuple[str, Strategy]]:
        given = (self.shard_size, self.replicas, self.sharded_data_parallel_degree, self.hybrid_shard_degree)
        if self.sharding is not Sharding.hybrid or any(given):
            return [("", self)]
        near = world.local_size
        sizes = [n for n in range(2, world.size) if world.size % n == 0 and (n % near == 0 or near % n == 0)]
        return [(f"strategy.shard_size={each}", replace(self, shard_size=each)) for each in sizes]

    def close(self) -> None:
        if self._shards is not None:
            self._shards.close()
        self._world = self._run = self._mesh = self._shards = None
        disconnect_ranks()

    # What TorchStrategy asks for.

    def init_context(self, plan: Plan) -> contextlib.AbstractContextManager[Any]:
        return torch.device("meta") if plan.deferred else contextlib.nullcontext()

    def _placed(self, model: nn.Module, weights: Weights, plan: Plan) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

        device = self._connected.device
        _refuse_single_numbers(model)
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
            part.register_forward_hook(own_output)
        for block in blocks:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=reshard, offload_policy=offload)
        fully_shard(model, mesh=self._mesh, reshard_after_forward=False, offload_policy=offload)
        self._prefetch([part for part in blocks if isinstance(part, FSDPModule)])
        model = materialise(model, weights, torch.device("cpu") if self.cpu_offload else device, plan.precision)
        if self.cpu_offload:  # what isn't cut isn't brought along for the forward pass
            for part in model.modules():
                for name, buffer in part.named_buffers(recurse=False):
                    part._buffers[name] = buffer.to(device)
        self._shards = Shards(
            model,
            self._connected,
            groups=self._groups(self._connected.size, self._connected.local_size),
            every_micro_batch=self.reduce_every_micro_batch,
        )
        return model

    def _prefetch(self, blocks: Sequence[FSDPModule]) -> None:
        """Explicitly, where it is more than what torch does anyway."""
        for index, block in enumerate(blocks if self.prefetch > 1 else ()):
            block.set_modules_to_forward_prefetch(list(blocks[index + 1 : index + 1 + self.prefetch]))
            block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, index - self.prefetch) : index])))

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model

    def _bare(self, model: nn.Module) -> nn.Module:
        return model

    def _synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        return self._cut.synchronised(last=last, only=self._set_up.plan.accumulation == 1)

    @property
    def _cut(self) -> Shards:
        assert self._shards is not None, "setup() comes first"
        return self._shards

    def evaluate(self, model: nn.Module, batch: Batch, loss_function: LossFunction) -> LossSum:
        try:
            return super().evaluate(model, batch, loss_function)
        finally:
            self._cut.cut_again()

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        try:
            return super().predict(model, batch)
        finally:
            self._cut.cut_again()

    def _global_norm(self, norm: Tensor) -> Tensor:
        return self._cut.global_norm(norm)

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


def _refuse_single_numbers(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if value.ndim == 0:
            raise ConfigError(
                f"FSDPStrategy: the parameter {name!r} is a single number, which can't be cut. "
                "Make it a vector of one (model), or use strategy=ddp (strategy)."
            )


def _divisors(number: int, *, whole: bool = False) -> str:
    """For people: the divisors of `number`, itself and 1 among them if `whole`."""
    found = [each for each in range(1, number + 1) if number % each == 0 and (whole or 1 < each < number)]
    return " or ".join(map(str, found)) if found else "another number of ranks"
