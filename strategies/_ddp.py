"""What plugins share whose ranks hold the whole model under torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies._communication import CommunicationClock, ReducerWatch
from strategies._ddp_traffic import Messages
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import World

_UNUSED_KEY = "ddp/unused"

# torch 2.13 renamed it, and warns about the old name.
_BUFFERS_ARGUMENT = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def arguments(
    model: nn.Module,
    plan: Plan,
    *,
    find_unused: bool,
    static_graph: bool | None = None,
    broadcast_buffers: bool | None = None,
) -> dict[str, Any]:
    """What DistributedDataParallel is to be told of `model`, whose gradients are made to fit into its buckets.

    Args:
        find_unused: look for parameters that a step doesn't use.
        static_graph: None: wherever it can be.
        broadcast_buffers: None: only where batch norm changes them.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and 1 in parameter.shape:
            parameter.register_hook(functools.partial(_laid_out, parameter.stride()))  # type: ignore[no-untyped-call]
    if static_graph is None:
        static_graph = plan.accumulation == 1 and not find_unused
    if broadcast_buffers is None:
        broadcast_buffers = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    return {
        "find_unused_parameters": find_unused,
        "static_graph": static_graph,
        "gradient_as_bucket_view": True,
        _BUFFERS_ARGUMENT: broadcast_buffers,
    }


def predicted(model: ModelSpec, world: WorldSpec, plan: Plan, messages: Messages) -> Footprint:
    """The footprint of a rank.

    Args:
        model: what is trained.
        world: ranks.
        plan: how a step goes.
        messages: in what gradients travel.
    """
    number = plan.precision.master_dtype.itemsize
    gradients = model.num_trainable * number
    outside = gradients if plan.accumulation > 1 else 0  # earlier micro-batches add up outside of the buckets
    return Footprint(
        weights_bytes=model.num_parameters * number,
        gradients_bytes=gradients,  # the buckets themselves: gradients are views of them
        moments_bytes=int(model.num_trainable * model.slots_per_parameter * number),
        activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
        buffers_bytes=model.largest_gradient * number + outside,
        beside=(outside,),
        collectives=messages.of_step(model, world, plan),
    )


class Replica:
    """A model under DistributedDataParallel: the backward pass that averages gradients, and the clock on it."""

    def __init__(
        self, model: DistributedDataParallel, world: World, owner: str, communication: CommunicationClock
    ) -> None:
        """`owner`: the strategy's class, for its messages."""
        # Neither the model, since a next one is set up before this is gone, nor the groups of the world.
        self._store, self._owner = world.store, owner
        self._measured = 0  # the reducer's iteration whose communication was reported last
        # After `close` the reducer may be the last owner of the group, and it would join the group's threads
        # while it holds Python's lock, for which such a thread waits to drop a hook's future. The group's own
        # handle lets go of the lock first; a module's attributes die in the order in which they were set.
        model.__dict__["_group_outlives_reducer"] = model.process_group
        self._clock = communication
        self._watch = ReducerWatch() if world.device.type == "cpu" and world.size > 1 else None
        if self._watch is not None:
            model._set_ddp_runtime_logging_sample_rate(1)  # type: ignore[no-untyped-call]

    def synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around one micro-batch: ranks exchange gradients only when `last`."""
        assert isinstance(model, DistributedDataParallel)
        return self._complete(model) if last else model.no_sync()

    @contextlib.contextmanager
    def _complete(self, model: DistributedDataParallel) -> Iterator[None]:
        """Around the backward that reduces: all gradients are averaged at its end, or all ranks say why not.

        torch would notice a parameter without gradient one step later, and this step would already
        have been taken with gradients that differ between ranks.
        """
        store = self._store
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
            message = self._unused_message(model)
            store.set(_UNUSED_KEY, message)
            raise ConfigError(message) from error

    def communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        """Seconds of the step just taken: exposed, and in all; None where that isn't measured here."""
        exposed, whole = self._clock.take()
        waited = None if self._watch is None else self._waited_s(model)
        if exposed is None or whole is None or waited is None:
            return exposed, whole
        return exposed + waited, max(whole, exposed + waited)

    def _waited_s(self, model: nn.Module) -> float | None:
        """How long gradients were waited for after backward, from the clock that torch keeps in the reducer: 30 us."""
        assert isinstance(model, DistributedDataParallel)
        logger = model.logger
        if logger is None:
            return None
        logger.set_runtime_stats_and_log()
        known = logger._get_ddp_logging_data().ints_map
        iteration = known.get("iteration", 0)
        if iteration == self._measured or "backward_comm_time" not in known:
            return None
        self._measured = iteration
        exposed_ns = known["backward_comm_time"] - known.get("backward_compute_comm_overlap_time", 0)
        return float(max(0, exposed_ns)) * 1e-9

    def _unused_message(self, model: DistributedDataParallel) -> str:
        named = model.module.named_parameters()
        unused = [name for name, value in named if value.requires_grad and value.grad is None]
        # A parameter may also have one from an earlier micro-batch; torch doesn't say which that is.
        which = (
            f" ({unused[0]!r} has none{f', nor have {len(unused) - 1} more' if unused[1:] else ''})" if unused else ""
        )
        return (
            f"{self._owner}: the last micro-batch of a step gave some parameter no gradient{which}, so the ranks can't "
            "average. Freeze what is never used, or look for it in each step (strategy.find_unused=true)."
        )


def _laid_out(stride: tuple[int, ...], gradient: Tensor) -> Tensor:
    """With the strides of the parameter, and so of the bucket: in a dimension of size 1 autograd leaves any, and DDP
    would warn. A copy, since with these strides autograd would keep what may be a part of another gradient.
    """
    return gradient if gradient.stride() == stride else gradient.clone(memory_format=torch.contiguous_format)
