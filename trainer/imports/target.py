"""What a checkpoint of ours holds for a model and an optimizer, and where each of its tensors comes from."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.checkpoint.deferred import OneByOne
from trainer.imports.source import Lazy, Slots, Source, names_of_groups
from trainer.optim import AbstractOptimizer

T = TypeVar("T")
Tick = Callable[[int], None]
"""Hears how many bytes were just read."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Names, shapes and dtypes, without values."""

    weights: dict[str, Tensor]
    """Parameters and persistent buffers by the bare model's names; tied ones once."""
    aliases: dict[str, str]
    """Further names of tied weights -> the name under which they are stored."""
    parameters: dict[str, nn.Parameter]
    """By the bare model's names, in its order; tied ones once."""
    moments: dict[str, dict[str, Tensor]]
    """Of each trained parameter, by slot; on the meta device."""

    @classmethod
    def of(cls, module: nn.Module, optimizer: AbstractOptimizer) -> Target:
        """Of a bare model, which may be on the meta device."""
        live = module.state_dict(keep_vars=True)
        parameters = dict(module.named_parameters())
        first: dict[int, str] = {}
        for name in (*(name for name in parameters if name in live), *live):
            first.setdefault(id(live[name]), name)
        return cls(
            weights={name: live[name].detach() for name in first.values()},
            aliases={name: first[id(value)] for name, value in live.items() if first[id(value)] != name},
            parameters=parameters,
            moments={
                name: _slots(name, parameter, optimizer)
                for name, parameter in parameters.items()
                if parameter.requires_grad
            },
        )

    @property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        tensors = [*self.weights.values(), *(slot for slots in self.moments.values() for slot in slots.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def fill(self, source: Source, names: list[list[str]] | None, tick: Tick) -> tuple[dict[str, Tensor], list[str]]:
        """What to write; each tensor is read when it is written.

        Args:
            source: where from; its names become this model's.
            names: of the parameters in each group of an optimizer that numbers them; None: found out.
            tick: hears what was read.

        Returns:
            Tensors under a checkpoint's names, and the parameters whose moments the source doesn't have, which are
            zero as in a parameter that was never updated.

        Raises:
            ConfigError: a name or a shape isn't this model's, or a moment not this optimizer's; names the first.
        """
        known = {name: name for name in self.weights} | self.aliases
        source.use_names(known)
        _compare_weights(self.weights, _canonical(source.weights, known), source.where)
        if source.groups:
            source.name_groups(_checked(names, source) if names else self._names(source))
        weights, moments = _canonical(source.weights, known), _canonical(source.moments, known)
        _compare_moments(self.moments, moments, source.where)
        one_by_one = OneByOne()

        def deferred(ours: Tensor, theirs: Lazy | None) -> Tensor:
            def read() -> Tensor:
                tick(ours.numel() * ours.element_size())
                return torch.zeros(ours.shape) if theirs is None else theirs.read().reshape(ours.shape)

            return one_by_one.tensor(ours.shape, ours.dtype, read)

        found = {f"weights/{name}": deferred(value, weights[name]) for name, value in self.weights.items()}
        for name, slots in self.moments.items():
            theirs = moments.get(name, {})
            found |= {f"optim/{name}/{slot}": deferred(value, theirs.get(slot)) for slot, value in slots.items()}
        return found, [name for name, slots in self.moments.items() if slots and name not in moments]

    def _names(self, source: Source) -> list[list[str]]:
        """Of an optimizer that numbers them; made from all parameters, or from those that are trained."""
        groups = [[_shape_of(slots) for slots in group] for group in source.groups]
        counted = sum(map(len, groups))
        every = [(name, tuple(value.shape)) for name, value in self.parameters.items()]
        trained = [(name, shape) for name, shape in every if self.parameters[name].requires_grad]
        return names_of_groups(groups, every if counted == len(every) else trained, source.where)


def _slots(name: str, parameter: nn.Parameter, optimizer: AbstractOptimizer) -> dict[str, Tensor]:
    """The moments that `optimizer` keeps for a parameter, found by a step on a stand-in, small if it may be."""
    shape = (2,) * parameter.dim() if optimizer.elementwise else parameter.shape
    stand_in = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
    stand_in.grad = torch.zeros_like(stand_in)
    probe = optimizer.make([(name, stand_in)])
    probe.step()
    found = {slot: value for slot, value in probe.state[stand_in].items() if isinstance(value, Tensor)}
    return {
        slot: torch.empty(parameter.shape if value.shape == shape else value.shape, dtype=value.dtype, device="meta")
        for slot, value in found.items()
    }


def _shape_of(slots: Slots) -> tuple[int, ...] | None:
    """Of the parameter that has these moments: the slots that aren't one number have its shape."""
    return max((value.shape for value in slots.values()), key=len, default=None)


def _checked(names: list[list[str]], source: Source) -> list[list[str]]:
    theirs, ours = [len(group) for group in source.groups], [len(group) for group in names]
    if theirs != ours:
        raise ConfigError(
            f"import: the optimizer in {source.where} has groups of {theirs} parameters, and {ours} names were given. "
            "Give as many, in its order (--names)."
        )
    return names


def _canonical(found: Mapping[str, T], known: Mapping[str, str]) -> dict[str, T]:
    """Tied ones once: what has the name under which they are stored, before what has another."""
    own = {name: value for name, value in found.items() if known.get(name, name) == name}
    return {known.get(name, name): value for name, value in found.items()} | own


def _compare_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Lazy], where: str) -> None:
    for name in ours:
        if name not in theirs:
            raise ConfigError(_mismatch(f"weights: {name!r} is missing in {where}", name, theirs))
    for name in theirs:
        if name not in ours:
            raise ConfigError(_mismatch(f"weights: {name!r} of {where} is not in this model", name, ours))
    for name, value in ours.items():
        _compare_shape(f"weights: {name!r}", value, theirs[name], where)


def _compare_moments(ours: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Slots], where: str) -> None:
    for name, slots in theirs.items():
        if name not in ours:
            raise ConfigError(_mismatch(f"moments: {name!r} of {where} is not trained in this model", name, ours))
        if slots.keys() != ours[name].keys():
            there, here = (", ".join(sorted(each)) or "none" for each in (slots, ours[name]))
            raise ConfigError(
                f"import: moments: those in {where} are {there}, and this optimizer's {here}. Choose the optimizer "
                "that it was trained with, or begin with fresh moments (optimizer, --weights-only)."
            )
        for slot, value in ours[name].items():
            _compare_shape(f"moments: {slot!r} of {name!r}", value, slots[slot], where)


def _compare_shape(what: str, ours: Tensor, theirs: Lazy, where: str) -> None:
    same = math.prod(theirs.shape) == 1 if ours.dim() == 0 else theirs.shape == tuple(ours.shape)
    if not same:
        raise ConfigError(
            f"import: {what} has shape {theirs.shape} in {where} and {tuple(ours.shape)} in this model. Use the "
            "configuration that it was trained with (model, --trainer)."
        )


def _mismatch(problem: str, name: str, others: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1)
    hint = f" (nearest: {near[0]!r})" if near else ""
    return f"import: {problem}{hint}. Use the configuration that it was trained with (model, --trainer)."
