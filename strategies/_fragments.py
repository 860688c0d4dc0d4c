"""An optimizer on the flat partitions of ZeRO that still sees parameters.

ZeRO lays the parameters of a group end to end, cuts the row into one partition per rank, and lets the optimizer
step the partition as if it were one parameter. Here the partition is taken apart again before the step: each
parameter's piece is stepped by itself, with its own count of steps, and one without a gradient isn't stepped.
Right for optimizers that treat every number by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies._torch import fresh_slots
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from strategies._nvme import NVMe

ELEMENTWISE = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Of torch.optim."""


def uncuttable(optimizer: str) -> ConfigError:
    """What there is to say of an optimizer that doesn't work number by number."""
    return ConfigError(
        f"DeepSpeedStrategy: {optimizer} looks at whole matrices, and ZeRO cuts them anywhere. "
        "Use optimizer=adamw, or a strategy that keeps matrices whole: ddp (optimizer, strategy)."
    )


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """This rank's piece of one parameter."""

    name: str
    start: int
    """Where it begins in the flattened parameter."""
    offset: int
    """Where it begins in the flat partition."""
    value: nn.Parameter
    """[length]: a view of the partition."""


class FragmentedOptimizer(Optimizer):
    """What the owner of the flat partitions steps."""

    def __init__(self, inner: Optimizer, factor: Callable[[], Tensor | float]) -> None:
        """Stand in for `inner`, made on the whole parameters.

        Args:
            inner: does the arithmetic; its groups keep their settings, so rates are set there.
            factor: asked before each partition's step: what gradients are multiplied by.

        Raises:
            ConfigError: `inner` looks at more than one number at a time.
        """
        kind = type(inner)
        if kind.__module__.split(".")[0] != "deepspeed" and kind.__name__ not in ELEMENTWISE:
            raise uncuttable(kind.__name__)
        inner.param_groups[:] = [group for group in inner.param_groups if group["params"]]  # DeepSpeed counts these
        self.inner = inner
        self.unused: set[str] = set()
        """Names of parameters that no rank used in this step."""
        self.nvme: NVMe | None = None
        """Where the partitions lie, and the moments are to lie."""
        self._factor = factor
        self._parts: dict[int, tuple[int, Tensor, list[Fragment]]] = {}
        self._kinds: list[dict[str, Any]] = []
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], {"lr": 0.0})

    def adopt(self, parts: list[tuple[int, Tensor, list[Fragment]]]) -> None:
        """Step these from now on.

        Args:
            parts: of each flat partition its group's index, itself, and its pieces.
        """
        self._parts = {id(flat): (group, flat, pieces) for group, flat, pieces in parts}
        for group in self.inner.param_groups:
            group["params"] = []
        device = parts[0][1].device
        self._kinds = [
            fresh_slots(nn.Parameter(torch.zeros(2, device=device)), self.inner, group)
            for group in self.inner.param_groups
        ]
        for index, _, pieces in parts:
            self.inner.param_groups[index]["params"] += [piece.value for piece in pieces]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the partitions that the owner put into the groups, each with its gradient in `.grad`."""
        for group in self.param_groups:
            for flat in group["params"]:
                if self.nvme is not None:
                    self.nvme.begin(flat)
                self._step(*self._parts[id(flat)])

    def _step(self, index: int, flat: Tensor, pieces: list[Fragment]) -> None:
        assert flat.grad is not None
        factor = self._factor()
        if isinstance(factor, Tensor) or factor != 1.0:
            flat.grad.mul_(factor)
        for piece in pieces:
            used = piece.name not in self.unused
            piece.value.grad = flat.grad.narrow(0, piece.offset, piece.value.numel()) if used else None
        groups = self.inner.param_groups
        self.inner.param_groups = [{**groups[index], "params": [piece.value for piece in pieces]}]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
            for piece in pieces:
                piece.value.grad = None
        for piece in pieces:
            self._keep(piece)

    def _keep(self, piece: Fragment) -> None:
        if self.nvme is not None and piece.value in self.inner.state:
            self.nvme.keep(piece, self.inner.state[piece.value])

    def parts(self) -> Iterable[tuple[int, Tensor, list[Fragment]]]:
        """Each flat partition with its group's index, and its pieces."""
        return self._parts.values()

    def fragments(self) -> Iterator[tuple[int, Fragment]]:
        """All pieces of this rank, each with its group's index."""
        for index, _, pieces in self._parts.values():
            for piece in pieces:
                yield index, piece

    def kinds(self, group: int) -> dict[str, Tensor]:
        """Slot -> what it begins as, for two numbers of a parameter: 1-d where each number has its own."""
        return {
            slot: value if isinstance(value, Tensor) else torch.tensor(float(value))
            for slot, value in self._kinds[group].items()
        }

    def slots(self, piece: Fragment, group: int) -> dict[str, Tensor]:
        """The live moments of a piece; what they begin as, before its first step."""
        known = self.inner.state.get(piece.value) or {}
        found = {}
        for slot, template in self.kinds(group).items():
            value = known.get(slot)
            if value is None:
                value = template.new_zeros(piece.value.shape if template.ndim else ())
            found[slot] = value if isinstance(value, Tensor) else torch.tensor(float(value))
        return found

    def put(self, piece: Fragment, group: int, slots: dict[str, Tensor]) -> None:
        """Go on from these moments.

        Args:
            piece: one of `fragments`.
            group: its group's index.
            slots: as `slots` gives them; copied.
        """
        state: dict[str, Any] = {}
        for slot, template in self._kinds[group].items():
            if isinstance(template, Tensor):
                state[slot] = slots[slot].to(template.device, template.dtype, copy=True)
            else:  # a plain count of steps
                state[slot] = type(template)(slots[slot].item())
        self.inner.state[piece.value] = state
        self._keep(piece)
