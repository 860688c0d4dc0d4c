"""What a prediction is made of: a model and machines that needn't be there, bytes on a rank, and what a step sends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a prediction needs to know of a model."""

    num_parameters: int
    num_trainable: int
    slots_per_parameter: float = 2.0
    """Moments that the optimizer keeps for each trainable number."""
    elementwise: bool = True
    """The optimizer updates each number from its own gradient and moments alone."""
    activation_bytes_per_sample: int = 0
    outline: nn.Module | None = field(default=None, compare=False, repr=False)
    """The model on the meta device, for a strategy whose memory depends on its parts; None: taken as one piece."""
    gradient_order: tuple[str, ...] = ()
    """Names of trained parameters in the order in which backward completes their gradients, for a strategy that sends
    them as they come; empty: the reverse of the model's own order."""

    @classmethod
    def of(cls, model: nn.Module, *, slots_per_parameter: float = 2.0, gradient_order: Sequence[str] = ()) -> ModelSpec:
        """Of a bare model, on any device; nothing of its storage is kept."""
        counts = [(value.numel(), value.requires_grad) for value in model.parameters()]
        return cls(
            num_parameters=sum(count for count, _ in counts),
            num_trainable=sum(count for count, trained in counts if trained),
            slots_per_parameter=slots_per_parameter,
            outline=_outline(model, {}),
            gradient_order=tuple(gradient_order),
        )

    @property
    def largest_gradient(self) -> int:
        """Numbers in the gradient of the largest parameter."""
        return max((value.numel() for value in self._trained), default=0)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, or gave before for the same key: a planner asks hundreds of times for the same."""
        known = self._known
        if key not in known:
            known[key] = make()
        return cast(T, known[key])

    @functools.cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    @functools.cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Without storage, in the model's own order, tied ones once; none without an outline."""
        return () if self.outline is None else tuple(self.outline.parameters())

    def trained(self) -> list[nn.Parameter]:
        """Trained parameters without storage, tied ones once, in `gradient_order`; none without an outline."""
        return [*self._trained]

    @functools.cached_property
    def _trained(self) -> tuple[nn.Parameter, ...]:
        """Looked up once: a planner asks hundreds of times."""
        if self.outline is None:
            return ()
        named = {name: value for name, value in self.outline.named_parameters() if value.requires_grad}
        first = [name for name in self.gradient_order if name in named]
        return tuple(named[name] for name in dict.fromkeys([*first, *reversed(named)]))

    def statistics(self, *, always: bool = False) -> list[Tensor]:
        """Buffers without storage of a model with batch norm, which training changes; of any model if `always`."""
        buffers, normalised = self._buffers
        return [*buffers] if always or normalised else []

    @functools.cached_property
    def _buffers(self) -> tuple[tuple[Tensor, ...], bool]:
        """All of them, and whether there is batch norm."""
        if self.outline is None:
            return (), False
        return tuple(self.outline.buffers()), any(isinstance(part, _BatchNorm) for part in self.outline.modules())


def _outline(module: nn.Module, known: dict[int, Any]) -> Any:
    """The same modules around the same names, their parameters without storage; `known`: id -> what stands for it."""
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for value in module._parameters.values():
        if value is not None and id(value) not in known:
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            known[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
    twin.__dict__ |= {
        "_parameters": {name: known.get(id(value)) for name, value in module._parameters.items()},
        "_modules": {name: part and _outline(part, known) for name, part in module._modules.items()},
        "_buffers": {name: _empty(value, known) for name, value in module._buffers.items()},
    }
    return twin


def _empty(buffer: Tensor | None, known: dict[int, Any]) -> Tensor | None:
    if buffer is not None and id(buffer) not in known:
        known[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return None if buffer is None else known[id(buffer)]


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """What a prediction needs to know of the machines."""

    size: int
    local_size: int


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Collectives of an optimizer step that are alike. What goes over the loop's own control group (counts, verdicts)
    isn't among them: no step waits for it.
    """

    kind: str
    """`all_reduce`, `all_gather`, `reduce_scatter`, `broadcast`."""
    payload_bytes: int
    """Of the whole tensor, per call: what an all-gather ends with, and a reduce-scatter begins with."""
    count: int
    ranks: int
    """That take part in a call."""
    stride: int = 1
    """From one of them to the next: 1 for neighbours; where groups of neighbours hold the same, the size of a group."""
    phase: str = "backward"
    """`forward`, `backward`: beside that pass's computing, which may hide it. `step`: between backward and the
    optimizer's update or after it, where nothing does."""


def merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Each kind once, in order of first appearance, without those in which nothing travels."""
    counts: dict[tuple[str, int, int, int, str], int] = {}
    for each in collectives:
        if each.count and each.payload_bytes and each.ranks > 1:
            alike = (each.kind, each.payload_bytes, each.ranks, each.stride, each.phase)
            counts[alike] = counts.get(alike, 0) + each.count
    return tuple(
        Collective(kind=kind, payload_bytes=size, count=count, ranks=ranks, stride=stride, phase=phase)
        for (kind, size, ranks, stride, phase), count in counts.items()
    )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Predicted bytes on one rank, by kind, and the collectives of a step."""

    weights_bytes: int
    gradients_bytes: int
    moments_bytes: int
    activations_bytes: int
    buffers_bytes: int
    """The most that a step takes besides: gathered weights, gradients under way."""
    collectives: tuple[Collective, ...]
    beside: tuple[int, ...] = ()
    """Of `buffers_bytes`, what there is at each stage of a micro-batch, where that is known: before the blocks, in the
    first, behind it, in the second and so on, forward and then backward from the last; one number: at each of them;
    empty: all of it, always. A parameter's gradient that is on its way to where it is kept isn't among it."""
    gradients_come: bool = False
    """`gradients_bytes` grow in backward and go with the step, so that activations give way to them; else they are
    there always, or by the time that activations are most."""
    stepped_bytes: int = 0
    """Of `gradients_bytes`, those that this rank's optimizer reads; 0: all of them."""
    gradients_whole_first: bool = False
    """Those of a stage are whole while it runs, besides `gradients_bytes` and `beside`."""
    step_bytes: int = 0
    """What there is besides when backward is through, or in the optimizer's step, and no activation is left."""
    copied_bytes: int = 0
    """Read and written in a step to put parts together after they were gathered, and apart before they are reduced."""
    host_bytes: int = 0  # how much of all this lies in host memory instead of the device's
    nvme_bytes: int = 0  # how much lies on NVMe, in neither

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        kept = self.weights_bytes + self.gradients_bytes + self.moments_bytes
        return kept + self.activations_bytes + self.buffers_bytes
