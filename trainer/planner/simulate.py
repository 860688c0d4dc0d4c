"""What a step sends, seen and not predicted: one process runs it as rank 0 of many that aren't there.

torch's fake process group stands for the others, and fractions have shapes without storage, so that neither the ranks
nor the model have to fit. The strategy's own `setup`, `forward_backward` and `step` run; their numbers mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from strategies.base import (
    Batch,
    Collective,
    LossFunction,
    MakeOptimizer,
    NamedParameters,
    Plan,
    Strategy,
    Weights,
    WorldSpec,
)
from strategies.errors import ConfigError
from strategies.footprint import merged
from strategies.precision import Numbers, Precision
from strategies.simulated import SimulatedBackend
from strategies.timing import mark_phases

_SETTLED = 3
"""Steps after which each sends the same: DistributedDataParallel makes its buckets anew before the third at latest."""
_NOTHING = Weights(seed=0, fill=lambda module: None)

_CALLS = {
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}
"""torch's operators: the name that a prediction has for them, and which argument is the whole that travels."""


def simulated(
    strategy: Strategy,
    make_model: Callable[[], nn.Module],
    batch: Batch,
    loss: LossFunction,
    world: WorldSpec,
    plan: Plan,
    make_optimizer: MakeOptimizer | None = None,
    *,
    stored: bool = False,
) -> tuple[Collective, ...]:
    """The collectives of one optimizer step, as rank 0 of `world` starts them.

    Args:
        strategy: not connected; it is closed in the end.
        make_model: makes the bare model; called on the meta device.
        batch: one micro-batch of a rank, on CPU; each of a step is this one.
        loss: token-summed loss of one micro-batch.
        world: whose ranks are pretended.
        plan: how a step goes.
        make_optimizer: as the strategy is to step; None: plain SGD, since torch's optimizers send nothing.
        stored: tensors get storage and are computed; several times faster for a model of a few thousand numbers.

    Returns:
        As `Footprint.collectives` predicts them: of a step after the first ones, in which buckets are still made.

    Raises:
        ConfigError: the strategy's steps can't be run without their ranks, or it can't run on that many.
    """
    if not strategy.can_simulate:
        raise ConfigError(
            f"Simulation: {type(strategy).__name__} brings a library that needs its ranks to be there. "
            "Simulate ddp or an fsdp strategy instead (strategy)."
        )
    if dist.is_initialized():
        raise ConfigError("Simulation: this process is a rank of a run already. Simulate in a process of its own.")
    plan = _as_sent(plan)
    try:
        strategy.connect(SimulatedBackend(size=world.size, local_size=world.local_size))
        with torch.device("meta"):
            bare = make_model()
        with contextlib.nullcontext() if stored else _without_storage(), _Listener() as listener:
            model, optimizer = strategy.setup(bare, _NOTHING, make_optimizer or _sgd, plan)
            for _ in range(1 + _SETTLED):
                listener.heard.clear()
                with listener.phase("forward"):
                    batches = [batch] * plan.accumulation
                    strategy.forward_backward(model, batches, loss, max(1, batch.num_targets * plan.accumulation))
                strategy.step(model, optimizer)
    finally:
        strategy.close()
    return merged(listener.heard)


def _as_sent(plan: Plan) -> Plan:
    """With what a CPU can't do, or needs long for, in place of what sends the same."""
    if plan.precision.numbers is Numbers.tf32:
        plan = replace(plan, precision=Precision())
    return replace(plan, compile=False)


def gradient_order(
    make_model: Callable[[], nn.Module], batch: Batch, loss: LossFunction, precision: Precision
) -> tuple[str, ...]:
    """Names of trained parameters in the order in which backward completes their gradients (`ModelSpec`).

    Args:
        make_model: makes the bare model; called on the meta device.
        batch: one micro-batch, on CPU.
        loss: of one micro-batch.
        precision: of the plan; autocast changes the order.
    """
    order: list[str] = []
    with torch.device("meta"):
        model = make_model()
    with _without_storage(), _Numberless():  # type: ignore[no-untyped-call]
        _place(model)
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))  # type: ignore[no-untyped-call]
        with precision.autocast(torch.device("cpu")):
            total = loss(model(**batch.inputs), batch).loss
        total.backward()  # type: ignore[no-untyped-call]
    return tuple(order)


def _without_storage() -> contextlib.AbstractContextManager[Any]:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _place(model: nn.Module) -> None:
    """From the meta device onto CPU; what is tied stays so, as it doesn't by `nn.Module.to_empty`."""
    placed: dict[int, Tensor] = {}
    for part in model.modules():
        for values in (part._parameters, part._buffers):
            for name, value in values.items():
                if value is not None and id(value) not in placed:
                    there = torch.empty_like(value, device="cpu")
                    is_parameter = isinstance(value, nn.Parameter)
                    placed[id(value)] = nn.Parameter(there, value.requires_grad) if is_parameter else there
                values[name] = None if value is None else placed[id(value)]  # type: ignore[assignment]


def _sgd(named: NamedParameters) -> torch.optim.Optimizer:
    return torch.optim.SGD([value for _, value in named], lr=0.0, foreach=False)


class _Numberless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where nothing is known of fractions: asked for one, there is an answer, and whole numbers are computed."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = _is_plain(args, kwargs)
        if function is torch.ops.aten._local_scalar_dense.default and not plain:
            return 1.0 if args[0].is_floating_point() else 1
        with _disable_current_modes() if plain else contextlib.nullcontext():
            return function(*args, **kwargs)


class _Listener(_Numberless):  # type: ignore[no-untyped-call]
    """Hears each collective where torch hands it to the group, from Python or from C++."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard: list[Collective] = []
        self._phase = "step"

    def __enter__(self) -> _Listener:
        mark_phases(self.phase)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        mark_phases(None)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is heard inside belongs to this part of the step."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace != "c10d":
            return results
        if function._opname not in _CALLS:
            raise RuntimeError(f"Simulation: torch's {function} isn't known here, so what it sends isn't counted")
        kind, index = _CALLS[function._opname]
        size = sum(value.nbytes for value in tree_leaves(args[index]))
        group = dist.ProcessGroup.unbox(next(value for value in args if isinstance(value, torch.ScriptObject)))
        members = dist.get_process_group_ranks(group)
        stride = members[1] - members[0] if len(members) > 1 else 1
        self.heard.append(
            Collective(kind=kind, payload_bytes=size, count=1, ranks=len(members), stride=stride, phase=self._phase)
        )
        return _arrived(results)


def _is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator needs no FakeTensor: on the meta device, where it would only cost time; and where there are
    nothing but whole numbers, which are few, and which torch's C++ reads.
    """
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    given = kwargs.get("device")
    onto = None if given is None else torch.device(given).type
    if any(isinstance(value, FakeTensor) for value in tensors):
        return False
    if onto == "meta" or (tensors and onto is None and all(value.is_meta for value in tensors)):
        return True
    dtypes = [value.dtype for value in tensors] or [kwargs.get("dtype") or torch.get_default_dtype()]
    return not any(value.is_meta for value in tensors) and not any(dtype.is_floating_point for dtype in dtypes)


def _arrived(results: tuple[Any, Any]) -> tuple[Any, Any]:
    """With what was sent as the answer; the fake group has none, and DistributedDataParallel looks at it."""
    future: Any = torch.futures.Future()
    future.set_result(results[0])
    work = torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]
    return results[0], work.boxed()
