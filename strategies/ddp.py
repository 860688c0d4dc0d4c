"""Distributed data parallel: every rank holds the whole model and averages gradients."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from strategies._ddp import Replica, arguments, predicted
from strategies._ddp_traffic import Messages
from strategies._torch import TorchStrategy
from strategies.backends import Backend, connect_ranks, disconnect_ranks
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import World

_MOST_MB = 1 << 20


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

    can_simulate = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replica: Replica | None = None
        if not 0 < self.bucket_mb < _MOST_MB:
            raise ConfigError(
                f"DDPStrategy: bucket_mb={self.bucket_mb} is not between 0 and {_MOST_MB}. "
                "Give MiB, such as 25 (strategy.bucket_mb)."
            )
        if self.static_graph and self.find_unused:
            raise ConfigError(
                "DDPStrategy: static_graph=true and find_unused=true contradict each other. "
                "A graph that changes can't be static: set one of them (strategy.static_graph)."
            )
        for key in ("powersgd_rank", "powersgd_start"):
            if self.hook is not CommunicationHook.powersgd and (given := getattr(self, key)) != getattr(
                type(self), key
            ):
                raise ConfigError(
                    f"DDPStrategy: {key}={given} means nothing with hook={self.hook.name}. "
                    f"Leave it out, or use hook=powersgd (strategy.{key})."
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
        if self.hook is CommunicationHook.bf16 and (name := backend.torch_name()) in ("gloo", "fake"):
            raise ConfigError(
                f"DDPStrategy: hook=bf16 needs NCCL, and the backend is {name}. "
                "Use hook=fp16 or hook=none (strategy.hook)."
            )
        self._world = connect_ranks(backend)
        return self._world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        self._refuse(plan)
        return predicted(
            model,
            world,
            plan,
            Messages(
                bucket_mb=self.bucket_mb,
                number_bytes=2 if self.hook in (CommunicationHook.bf16, CommunicationHook.fp16) else None,
                powersgd_rank=self.powersgd_rank if self.hook is CommunicationHook.powersgd else None,
                find_unused=self.find_unused,
                buffers=self.broadcast_buffers,
            ),
        )

    def close(self) -> None:
        self._world = self._run = self._replica = None
        disconnect_ranks()

    def _refuse(self, plan: Plan) -> None:
        if self.static_graph and plan.accumulation > 1:
            raise ConfigError(
                f"DDPStrategy: static_graph=true can't accumulate ({plan.accumulation} micro-batches per step). "
                "Leave it null, or raise the micro-batch (strategy.static_graph, trainer.micro_batch)."
            )

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        self._refuse(plan)
        device = self._connected.device
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_mb,
            **arguments(
                model,
                plan,
                find_unused=self.find_unused,
                static_graph=self.static_graph,
                broadcast_buffers=self.broadcast_buffers,
            ),
        )
        self._register_hook(wrapped)
        self._replica = Replica(wrapped, self._connected, type(self).__name__, self._clock)
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
        assert self._replica is not None
        return self._replica.synchronised(model, last)

    def _communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        assert self._replica is not None
        return self._replica.communication(model)
