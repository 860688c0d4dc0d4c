"""What a checkpoint of another system holds, whichever wrote it: names, shapes, and how to read each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_OUTERMOST = "module."

Slots = dict[str, "Lazy"]
"""Name of a moment, such as `exp_avg` -> where it is."""


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def lazy(value: Any) -> Lazy:
    """A tensor that is there, perhaps as a file mapped into memory; or a number."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return Lazy(shape=tuple(tensor.shape), read=lambda: tensor)


def slots_of(entry: Mapping[str, Any]) -> Slots:
    """A parameter's moments, from an optimizer's state of it."""
    return {slot: lazy(value) for slot, value in entry.items() if isinstance(value, Tensor | int | float)}


@dataclass(kw_only=True)
class Source:
    """A checkpoint of another system."""

    what: str
    """For people: the system, and how the checkpoint was cut."""
    where: str
    """For people: the folder."""
    ranks: int
    """That wrote it."""
    weights: dict[str, Lazy]
    """Parameters and buffers, by the names that the files have."""
    moments: dict[str, Slots] = field(default_factory=dict)
    """Of each parameter that the optimizer has a state for, by the names that the files have."""
    groups: list[list[Slots]] = field(default_factory=list)
    """Of an optimizer that numbers its parameters: per group, in its order; `name_groups` makes `moments` of them.

    A parameter without state has none; the slot `fp32` is a master copy of the parameter itself.
    """
    step: int | None = None
    """Optimizer steps taken, where that is written down."""
    samples: int | None = None
    """Samples seen, where that is written down."""
    scaler: dict[str, float] = field(default_factory=dict)
    """Loss scale and growth count."""

    @property
    def has_moments(self) -> bool:
        """Whether there is an optimizer's state at all."""
        return bool(self.moments) or any(any(group) for group in self.groups)

    def forget_moments(self) -> None:
        """Go on as if only weights had been saved; master copies stay."""
        self.moments = {}
        self.groups = [[{k: v for k, v in entry.items() if k == "fp32"} for entry in group] for group in self.groups]

    def use_names(self, known: Mapping[str, object]) -> None:
        """Take off what wrappers have put into names, so far as that leads to names that are known.

        Args:
            known: the bare model's names, aliases among them.
        """
        self.weights = {_bare(name, known): value for name, value in self.weights.items()}
        self.moments = {_bare(name, known): value for name, value in self.moments.items()}

    def name_groups(self, names: list[list[str]]) -> None:
        """Say which parameters the numbered ones are."""
        for group, members in zip(self.groups, names, strict=True):
            for slots, name in zip(group, members, strict=True):
                rest = dict(slots)
                if (master := rest.pop("fp32", None)) is not None:
                    self.weights[name] = master
                if rest:
                    self.moments[name] = rest
        self.groups = []

    def updates(self) -> int | None:
        """The most updates that the optimizer says any parameter had; None: it doesn't count them."""
        counts = {id(slots["step"]): slots["step"] for slots in self.moments.values() if "step" in slots}
        return max((int(count.read()) for count in counts.values()), default=None)


def names_of_groups(groups: list[list[tuple[int, ...] | None]], parameters: list[tuple[str, tuple[int, ...]]],
                    where: str) -> list[list[str]]:  # fmt: skip
    """Which parameters an optimizer numbered, from nothing but their shapes: the one way in which they fit.

    Args:
        groups: shape of each parameter in each group, in the optimizer's order; None: it has no state.
        parameters: name and shape in the model's order; every group has its own in this order.
        where: for people.

    Raises:
        ConfigError: there is no such way, or more than one.
    """
    sizes = tuple(len(group) for group in groups)
    fix = "Give a JSON file with a list of names for each group, in the optimizer's order (--names)."
    if sum(sizes) != len(parameters):
        raise ConfigError(
            f"import: the optimizer in {where} has {sum(sizes)} parameters, and this model {len(parameters)}. {fix}"
        )
    # From the front: after each parameter, the places at which the groups can stand, and in how many ways (two count
    # as many).
    rows: list[dict[tuple[int, ...], int]] = [{(0,) * len(groups): 1}]
    for name, shape in parameters:
        row: dict[tuple[int, ...], int] = {}
        for place, ways in rows[-1].items():
            for index in range(len(groups)):
                if _fits(groups, place, index, shape):
                    after = (*place[:index], place[index] + 1, *place[index + 1 :])
                    row[after] = min(2, row.get(after, 0) + ways)
        if not row:
            raise ConfigError(
                f"import: {name!r} of shape {shape} has no place in the groups of the optimizer in {where}. "
                f"Is it the same model? {fix}"
            )
        if len(row) > _MOST:
            raise ConfigError(f"import: there are too many ways to name the optimizer's groups in {where}. {fix}")
        rows.append(row)
    if rows[-1][sizes] > 1:
        raise ConfigError(f"import: the shapes of the optimizer's groups in {where} don't say whose they are. {fix}")
    return _backwards(groups, parameters, rows, sizes)


_MOST = 100_000
"""Places that are looked at together; one or two groups have far fewer."""


def _fits(
    groups: list[list[tuple[int, ...] | None]], place: tuple[int, ...], index: int, shape: tuple[int, ...]
) -> bool:
    """Whether the next parameter of a group may have that shape."""
    group, at = groups[index], place[index]
    return at < len(group) and group[at] in (None, shape)


def _backwards(
    groups: list[list[tuple[int, ...] | None]],
    parameters: list[tuple[str, tuple[int, ...]]],
    rows: list[dict[tuple[int, ...], int]],
    place: tuple[int, ...],
) -> list[list[str]]:
    """The names along the only way to `place`."""
    names: list[list[str]] = [[] for _ in groups]
    for (name, shape), row in zip(reversed(parameters), reversed(rows[:-1]), strict=True):
        for index in range(len(groups)):
            before = (*place[:index], place[index] - 1, *place[index + 1 :])
            if before in row and _fits(groups, before, index, shape):
                names[index].insert(0, name)
                place = before
                break
    return names


def _bare(name: str, known: Mapping[str, object]) -> str:
    if name in known:
        return name
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name not in known and name.startswith(_OUTERMOST):
        name = name.removeprefix(_OUTERMOST)
    return name
