"""Distributed data parallel: every rank holds the whole model and averages gradients."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from strategies._torch import TorchStrategy
from strategies.backends import Backend, connect_ranks
from strategies.base import Collective, Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import World


# torch 2.13 renamed it, and warns about the old name.
_BUFFERS_ARGUMENT = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class CommunicationHook(Enum):
    """What travels in place of fp32 gradients."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"
    powersgd = "powersgd"


@final
@dataclass(kw_only=True)
class DDPStrategy(TorchStrategy):
    """torch's DistributedDataParallel.

    Raises:
        ConfigError: a setting is out of range, or two contradict each other.
    """

    bucket_mb: float = 25.0
    """Gradients are reduced in buckets of this many MiB, the first as soon as it is complete."""
    find_unused: bool = False
    """Look for parameters that a step doesn't use; costs a walk over the graph in every step."""
    static_graph: bool | None = None
    """The same parameters are used in every step; null: yes, where accumulation is 1 and `find_unused` is off."""
    broadcast_buffers: bool | None = None
    """Copy rank 0's buffers to all ranks in every forward; null: only for models with batch norm."""
    hook: CommunicationHook = CommunicationHook.none
    """Compress gradients while they travel."""
    powersgd_rank: int = 1
    """hook=powersgd: rank of the approximation; higher is closer and slower."""
    powersgd_start: int = 1000
    """hook=powersgd: optimizer steps with plain averages first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bucket_mb > 0:
            raise ConfigError(
                f"DDPStrategy: bucket_mb={self.bucket_mb} is not positive. Give MiB, such as 25 (strategy.bucket_mb)."
            )
        if self.static_graph and self.find_unused:
            raise ConfigError(
                "DDPStrategy: static_graph=true and find_unused=true contradict each other. "
                "A graph that changes can't be static: set one of them (strategy.static_graph)."
            )
        if self.powersgd_rank < 1:
            raise ConfigError(
                f"DDPStrategy: powersgd_rank={self.powersgd_rank} is below 1. Try 1 to 4 (strategy.powersgd_rank)."
            )
        if self.powersgd_start < 2:
            raise ConfigError(
                f"DDPStrategy: powersgd_start={self.powersgd_start} is below 2, the first step that DDP's rebuilt "
                "buckets allow. Try 1000 (strategy.powersgd_start)."
            )

    def connect(self, backend: Backend) -> World:
        if self.hook is CommunicationHook.bf16 and backend.torch_name() == "gloo":
            raise ConfigError(
                "DDPStrategy: hook=bf16 needs NCCL, and the backend is gloo. "
                "Use hook=fp16 or hook=none (strategy.hook)."
            )
        self._world = connect_ranks(backend)
        return self._world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        number = plan.precision.master_dtype.itemsize
        gradients = model.num_trainable * number
        bucket = int(self.bucket_mb * 2**20)
        buckets = max(1, -(-gradients // bucket))
        sent = {CommunicationHook.bf16: 2, CommunicationHook.fp16: 2}.get(self.hook, number)
        return Footprint(
            weights_bytes=model.num_parameters * number,
            gradients_bytes=gradients,  # the buckets themselves: gradients are views of them
            moments_bytes=int(model.num_trainable * model.slots_per_parameter * number),
            activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
            buffers_bytes=0,
            collectives=(
                Collective(
                    kind="all_reduce",
                    payload_bytes=model.num_trainable * sent // buckets,
                    count=buckets,
                    ranks=world.size,
                ),
            ),
        )

    def close(self) -> None:
        self._world = self._run = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        static = self.static_graph
        if static and plan.accumulation > 1:
            raise ConfigError(
                f"DDPStrategy: static_graph=true can't accumulate ({plan.accumulation} micro-batches per step). "
                "Leave it null, or raise the micro-batch (strategy.static_graph, trainer.micro_batch)."
            )
        if static is None:
            static = plan.accumulation == 1 and not self.find_unused
        buffers = self.broadcast_buffers
        if buffers is None:
            buffers = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
        device = self._connected.device
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_mb,
            find_unused_parameters=self.find_unused,
            static_graph=static,
            gradient_as_bucket_view=True,
            **{_BUFFERS_ARGUMENT: buffers},
        )
        self._register_hook(wrapped)
        return wrapped

    def _register_hook(self, model: DistributedDataParallel) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        if self.hook is CommunicationHook.bf16:
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif self.hook is CommunicationHook.fp16:
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.hook is CommunicationHook.powersgd:
            state = powerSGD_hook.PowerSGDState(
                process_group=None,
                matrix_approximation_rank=self.powersgd_rank,
                start_powerSGD_iter=self.powersgd_start,
            )
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def _bare(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, DistributedDataParallel)
        bare: nn.Module = model.module
        return bare

    def _synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(model, DistributedDataParallel)
        return contextlib.nullcontext() if last else model.no_sync()

    def _communication_s(self, model: nn.Module) -> float | None:
        return None
