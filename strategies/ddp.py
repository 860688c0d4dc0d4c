"""Distributed data parallel: every rank holds the whole model and averages gradients."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies._torch import TorchStrategy
from strategies.backends import Backend, connect_ranks
from strategies.base import Collective, Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import World

_UNUSED_KEY = "ddp/unused"
_MOST_MB = 1 << 20

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
        self._measured = 0  # the reducer's iteration whose communication was reported last
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
            # On its way into a bucket; and what earlier micro-batches have added up outside of the buckets.
            buffers_bytes=model.largest_gradient * number + (gradients if plan.accumulation > 1 else 0),
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
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and 1 in parameter.shape:
                parameter.register_hook(functools.partial(_laid_out, parameter.stride()))  # type: ignore[no-untyped-call]
        device = self._connected.device
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=self.bucket_mb,
            find_unused_parameters=self.find_unused,
            static_graph=static,
            gradient_as_bucket_view=True,
            **{_BUFFERS_ARGUMENT: buffers},  # type: ignore[arg-type]
        )
        self._register_hook(wrapped)
        # After `close` the reducer may be the last owner of the group, and it would join the group's threads
        # while it holds Python's lock, for which such a thread waits to drop a hook's future. The group's own
        # handle lets go of the lock first; a module's attributes die in the order in which they were set.
        wrapped.__dict__["_group_outlives_reducer"] = wrapped.process_group
        self._measured = 0
        if device.type == "cpu":
            wrapped._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call]
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
        return self._complete(model) if last else model.no_sync()

    @contextlib.contextmanager
    def _complete(self, model: DistributedDataParallel) -> Iterator[None]:
        """Around the backward that reduces: all gradients are averaged at its end, or all ranks say why not.

        torch would notice a parameter without gradient one step later, and this step would already
        have been taken with gradients that differ between ranks.
        """
        store = self._connected.store
        try:
            yield
        except RuntimeError as error:
            # A rank whose own graph was whole waits for one whose wasn't, until that one hangs up.
            with contextlib.suppress(RuntimeError):
                if store.check([_UNUSED_KEY]):
                    raise ConfigError(store.get(_UNUSED_KEY).decode()) from error
            raise
        try:
            model._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            message = _unused_message(model)
            store.set(_UNUSED_KEY, message)
            raise ConfigError(message) from error

    def _communication_s(self, model: nn.Module) -> float | None:
        """From the clock that torch keeps in the reducer.

        On CPU of this very step (30 us). On a GPU torch reads its events in a sample of the steps, in
        the forward after; reading them here would make the device wait, so the value is one step old.
        """
        assert isinstance(model, DistributedDataParallel)
        logger = model.logger
        if logger is None:
            return None
        if self._connected.device.type == "cpu":
            logger.set_runtime_stats_and_log()
        known = logger._get_ddp_logging_data().ints_map
        iteration = known.get("iteration", 0)
        if iteration == self._measured or "backward_comm_time" not in known:
            return None
        self._measured = iteration
        exposed_ns = known["backward_comm_time"] - known.get("backward_compute_comm_overlap_time", 0)
        return float(max(0, exposed_ns)) * 1e-9


def _laid_out(stride: tuple[int, ...], gradient: Tensor) -> Tensor:
    """With the strides of the parameter, and so of the bucket: in a dimension of size 1 autograd leaves any, and DDP
    would warn. A copy, since with these strides autograd would keep what may be a part of another gradient.
    """
    return gradient if gradient.stride() == stride else gradient.clone(memory_format=torch.contiguous_format)


def _unused_message(model: DistributedDataParallel) -> str:
    unused = [name for name, value in model.module.named_parameters() if value.requires_grad and value.grad is None]
    # A parameter may also have one from an earlier micro-batch; torch doesn't say which that is.
    which = f" ({unused[0]!r} has none{f', nor have {len(unused) - 1} more' if unused[1:] else ''})" if unused else ""
    return (
        f"DDPStrategy: the last micro-batch of a step gave some parameter no gradient{which}, so the ranks can't "
        "average. Freeze what is never used, or look for it in each step (strategy.find_unused=true)."
    )
