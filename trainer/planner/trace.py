"""One micro-batch of a model, forward and backward, without storage: what is kept and what is computed, block by block.

The model runs as it will in training, with its loss and its activation checkpointing, on fake tensors: so anything that
torch can run is counted, and nothing is known of families of models. Of blocks that are alike two are traced, and the
others have what the second had.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies.activations import ActivationCheckpointing
from strategies.base import Batch, LossFunction
from strategies.blocks import find_blocks
from strategies.errors import ConfigError
from strategies.precision import Precision
from trainer.planner.kernels import As, Call, call_of
from trainer.planner.layout import Layout
from trainer.planner.stages import Stage, Trace

_ROUND_TO = 512
"""Bytes: torch's allocators give multiples."""


def trace(
    model: nn.Module,
    batch: Batch,
    loss_function: LossFunction,
    *,
    precision: Precision,
    activation_checkpointing: ActivationCheckpointing | None = None,
    device: str = "cuda",
    cast: bool = False,
) -> Trace:
    """Run one micro-batch without storage.

    Args:
        model: on the meta device; it is as before afterwards.
        batch: of one rank, with tensors on CPU.
        loss_function: as for training.
        precision: autocast as in training.
        activation_checkpointing: which activations are computed again.
        device: whose operators are taken, `cuda` or `cpu`.
        cast: weights are in the compute dtype themselves, and there is no autocast.

    Raises:
        ConfigError: the model can't run without storage.
    """
    blocks = find_blocks(model)
    with _recomputing(model, blocks, activation_checkpointing):
        return _first_that_runs(model, blocks, batch, loss_function, precision, device, cast)


@contextlib.contextmanager
def _recomputing(model: nn.Module, blocks: Sequence[nn.Module], how: ActivationCheckpointing | None) -> Iterator[None]:
    """Within, the model trains, and its blocks forget what is to be computed again."""
    before = [block.__dict__.get("forward") for block in blocks]
    was_training = model.training
    model.train()
    try:
        if how is not None:
            how.apply(blocks)
        yield
    finally:
        model.train(was_training)
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _first_that_runs(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Batch,
    loss_function: LossFunction,
    precision: Precision,
    device: str,
    cast: bool,
) -> Trace:
    whole = Layout(model, blocks, most_alike=len(blocks))
    short = Layout(model, blocks, most_alike=2)
    layouts = [short, whole] if len(short.run) < len(whole.run) else [whole]  # a model may count its blocks itself
    for layout in layouts:
        try:
            record = _run(model, layout, batch, loss_function, precision, device, cast)
        except Exception as error:
            if layout is not layouts[-1]:
                continue
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"plan: {type(model).__name__} can't run without storage: {first[:200]} Its forward may read values "
                "(.item(), sizes that depend on data). Avoid that, or plan another (model)."
            ) from error
        return record.spread(layout.places, len(batch.labels), batch.num_tokens or batch.num_targets)
    raise AssertionError("one of them runs or raises")


def _run(
    model: nn.Module,
    layout: Layout,
    batch: Batch,
    loss_function: LossFunction,
    precision: Precision,
    device: str,
    cast: bool,
) -> _Record:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fake, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")

    def faked(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = precision.compute_dtype if cast else precision.master_dtype
        empty = torch.empty_like(tensor, dtype=dtype, device="meta")
        found: Tensor = FakeTensor(fake, empty, cpu)
        return found

    record = _Record(last=2 * len(layout.run))
    with contextlib.ExitStack() as stack:
        stack.enter_context(layout.only())
        stack.enter_context(_replaced(model, faked, record))
        stack.enter_context(fake)
        micro_batch = batch.map(faked)
        stack.enter_context(As(device, None if cast else precision))
        stack.enter_context(_marked(layout.run, record))
        stack.enter_context(record)
        with contextlib.nullcontext() if cast else precision.autocast(cpu):
            loss = loss_function(model(**micro_batch.inputs), micro_batch).loss
        record.turn()
        # As loss.backward() does, which would leave the mode that chooses kernels, and blocks compute again in it.
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        record.close()
    return record


@contextlib.contextmanager
def _replaced(model: nn.Module, faked: Any, record: _Record) -> Iterator[None]:
    """Within, parameters and buffers are fake tensors; tied ones stay tied."""
    known: dict[int, Tensor] = {}
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in model.modules()]

    def parameter(value: nn.Parameter) -> Tensor:
        if id(value) not in known:
            known[id(value)] = made = nn.Parameter(faked(value.detach()), requires_grad=value.requires_grad)
            record.leave_out(made)
            if value.requires_grad:
                made.register_post_accumulate_grad_hook(record.forget_gradient)  # type: ignore[no-untyped-call]
        return known[id(value)]

    try:
        for part, parameters, buffers in before:
            part._parameters.update({name: v if v is None else parameter(v) for name, v in parameters.items()})  # type: ignore[misc]
            part._buffers.update({name: v if v is None else faked(v) for name, v in buffers.items()})
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


@contextlib.contextmanager
def _marked(run: Sequence[nn.Module], record: _Record) -> Iterator[None]:
    """Within, the record hears where each block begins and ends, in both directions."""
    handles = []

    def on_gradient(tensor: Tensor | None, place: int) -> None:
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda _: record.enter("backward", place))  # type: ignore[no-untyped-call]

    def hooks(place: int) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            record.enter("forward", place)
            on_gradient(_first(args, kwargs), place - 1)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            on_gradient(_first((output,), {}), place)
            record.enter("forward", place + 1)

        return before, after

    for number, block in enumerate(run):
        before, after = hooks(2 * number + 1)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: Any, kwargs: Any) -> Tensor | None:
    return next((value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), None)


@dataclass
class _Seen:
    before: int
    gradients_before: int
    moments: list[tuple[int, int]]
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def at(cls, live: int, gradients: int) -> _Seen:
        """A stage that begins."""
        return cls(live, gradients, [(live, gradients)])

    def note(self, live: int, gradients: int) -> None:
        """There is so much of both."""
        most, there = self.moments[-1]
        if gradients > there:
            self.moments.append((live, gradients))
        elif live > most:
            self.moments[-1] = (live, gradients)

    def as_stage(self, live: int, gradients: int) -> Stage:
        """The same where there is so much when it begins."""
        more, come = live - self.before, gradients - self.gradients_before
        moments = tuple((most + more, there + come) for most, there in self.moments)
        return Stage(before=live, peak=max(most for most, _ in moments), calls=self.frozen, moments=moments)

    @functools.cached_property
    def frozen(self) -> tuple[Call, ...]:
        """One tuple for all stages that are like this one."""
        return tuple(self.calls)


def _fill(stages: dict[int, _Seen], places: Iterable[int], end: _Seen) -> None:
    """Stages that never began, as those of a frozen part in backward: nothing, where the next one begins."""
    following = end
    for place in places:
        following = stages.setdefault(place, _Seen.at(following.before, following.gradients_before))


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes and operators by stage. What isn't made while it is on, such as parameters, isn't counted."""

    def __init__(self, last: int) -> None:
        """`last`: number of the stage with the loss."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._last, self._live, self._gradients = last, 0, 0
        self._sizes: dict[int, int] = {}
        self._left_out: set[int] = set()
        self._forward: dict[int, _Seen] = {}
        self._backward: dict[int, _Seen] = {}
        self._place = -1
        self._now = _Seen.at(0, 0)
        self.enter("forward", 0)

    def enter(self, direction: str, place: int) -> None:
        """A stage begins, and the one before ends; once passed, none comes back."""
        if direction == "forward":
            if place > self._place:
                self._place = place
                self._now = self._forward[place] = _Seen.at(self._live, self._gradients)
        elif place < self._place:
            self._place = place
            self._now = self._backward[place] = _Seen.at(self._live, self._gradients)

    def turn(self) -> None:
        """From forward to backward."""
        self._place = self._last + 1
        self.enter("backward", self._last)

    def close(self) -> None:
        """Nothing runs any more."""
        self._after_backward = _Seen.at(self._live, self._gradients)
        _fill(self._backward, range(self._last + 1), self._after_backward)
        _fill(self._forward, range(self._last, -1, -1), self._backward[self._last])

    def leave_out(self, parameter: Tensor) -> None:
        """It and views of it aren't activations."""
        self._left_out.add(parameter.untyped_storage()._cdata)

    def forget_gradient(self, parameter: Tensor) -> None:
        """It is no activation, and the strategy says how long there is how much of it."""
        if parameter.grad is not None:
            size = self._sizes.pop(parameter.grad.untyped_storage()._cdata, 0)
            self._live -= size
            self._gradients += size
            self._now.note(self._live, self._gradients)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        if (call := call_of(function, args, kwargs, result)) is not None:
            self._now.calls.append(call)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._left_out:
            return
        self._sizes[key] = size = -(-storage.nbytes() // _ROUND_TO) * _ROUND_TO
        self._live += size
        self._now.note(self._live, self._gradients)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)

    def spread(self, places: Sequence[int], micro_batch: int, num_tokens: int) -> Trace:
        """From the stages that ran to those of the whole model: `places[i]` is the one that stage i is like.

        A stage that is like another adds to what is kept what that one added.
        """
        after_forward = self._backward[self._last]
        live = gradients = 0
        forward, backward = list[Stage](), list[Stage]()
        for place in places:
            seen = self._forward[place]
            forward.append(seen.as_stage(live, gradients))
            live += self._forward.get(place + 1, after_forward).before - seen.before
        for place in reversed(places):
            seen = self._backward[place]
            backward.append(seen.as_stage(live, gradients))
            following = self._backward.get(place - 1, self._after_backward)
            live += following.before - seen.before
            gradients += following.gradients_before - seen.gradients_before
        return Trace(
            forward=tuple(forward), backward=tuple(reversed(backward)), gradients=gradients, micro_batch=micro_batch,
            num_tokens=num_tokens,
        )  # fmt: skip
