"""What plugins share whose models are cut by torch's `fully_shard`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from strategies._statistics import statistics_of, take_over
from strategies.world import World

if TYPE_CHECKING:  # imported late, since every start reads this file
    from torch.distributed.fsdp import FSDPModule


class Shards:
    """The parts of a cut model: when their gradients are reduced, and which parameters were used at all."""

    def __init__(self, model: nn.Module, world: World, *, groups: int, every_micro_batch: bool) -> None:
        """Of a model whose parts `fully_shard` has cut.

        Args:
            model: the outermost part.
            world: its ranks.
            groups: how many groups of ranks hold the same.
            every_micro_batch: reduce gradients after each of them, not once per step.
        """
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(model, FSDPModule)
        model.set_reduce_scatter_unused_params(True)  # else ranks that use different ones send different lengths
        self.parts: list[FSDPModule] = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self._device, self._groups, self._every = world.device, groups, every_micro_batch
        self._used: set[str] = set()  # in this step, on this rank
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._statistics = statistics_of(model)
        self._note_use(model)

    def _note_use(self, model: nn.Module) -> None:
        """Hear of each gradient on this rank, at the tensors into which parameters are gathered time and again."""

        def gathered(module: nn.Module, args: Any) -> None:
            for name, value in module.named_parameters(prefix=names[module]):
                if value.requires_grad and not hasattr(value, "placements"):
                    value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        lambda _, name=name: used.add(name)
                    )
            handles.pop(module).remove()  # once is enough

        parts, used = set(self.parts), self._used  # the hooks outlive this: they may hold nothing but that set
        names = {module: name for name, module in model.named_modules() if module in parts}
        handles = {module: module.register_forward_pre_hook(gathered) for module in names}

    def close(self) -> None:
        """Let go of the model, and with it of the groups that it talks over."""
        self.parts, self._statistics, self._trained = [], [], {}

    @contextlib.contextmanager
    def synchronised(self, *, last: bool, only: bool) -> Iterator[None]:
        """Around one micro-batch: the `last` of a step, or its `only` one."""
        root = self.parts[0]
        if not only:
            root.set_is_last_backward(last)
            root.set_requires_gradient_sync(last or self._every)
            root.set_requires_all_reduce(last)
        take_over(self._statistics)
        try:
            yield
        except BaseException:
            root.reset_iter_state()
            raise

    def cut_again(self) -> None:
        """After a forward pass that no backward follows, which would do it."""
        for part in self.parts:
            part.reshard()

    def global_norm(self, norm: Tensor) -> Tensor:
        """The norm over all ranks, from that of this rank's part.

        Also takes the zeros away that were reduced for what no rank has used; a rank that used all needn't know.
        """
        device, missing = self._device, len(self._used) < len(self._trained)
        told = torch.ones(1 + len(self._trained), device=device, dtype=torch.float64)
        if missing:
            told[1:] = torch.tensor([name in self._used for name in self._trained])
        told[0] = norm.to(device, torch.float64).square() / self._groups
        dist.all_reduce(told)
        if missing:
            for value, count in zip(self._trained.values(), told[1:].tolist(), strict=True):
                value.grad = value.grad if count else None
        self._used.clear()
        return told[0].sqrt().to(norm.device, norm.dtype)


def own_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Of a part that ends in a view (a `nn.Linear` with a bias does): an in-place operation on a view would lose the
    hook that gathers the part's weights for its backward pass.
    """
    return tree_map_only(Tensor, lambda value: value.clone() if value._is_view() else value, output)
