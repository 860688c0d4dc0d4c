"""Which blocks of a model are traced, and which of them the others are like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, torch.dtype)
_OF_PLACE = ("layer_idx", "layer_id", "layer_index", "block_idx", "idx", "index")
"""Attributes in which blocks that are alike differ all the same."""


class Layout:
    """Which blocks run, and what the others are like."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], most_alike: int) -> None:
        self.lists = {
            id(child): part
            for part in model.modules()
            if isinstance(part, (nn.ModuleList, nn.Sequential))
            for child in part
        }
        kinds = [(id(self.lists.get(id(block), block)), _kind(block)) for block in blocks]
        members: dict[Any, list[int]] = {}
        for index, kind in enumerate(kinds):
            members.setdefault(kind, []).append(index)
        chosen = sorted(index for each in members.values() for index in each[:most_alike])
        self.blocks = blocks
        self.run = [blocks[index] for index in chosen]
        place = {index: 2 * number + 1 for number, index in enumerate(chosen)}
        self.places = [0]
        """For each stage of the whole model, the one that runs and that it is like."""
        for index, kind in enumerate(kinds):
            alike = members[kind][:most_alike]
            mine = place[index if index in place else alike[-1]]
            follows = index + 1 < len(blocks) and kinds[index + 1][0] == kind[0]
            last = max(other for other in chosen if kinds[other][0] == kind[0])
            if index not in place or not follows:
                behind = place[alike[0] if follows else last]
            else:
                behind = place[alike[0]] if index == last else mine
            self.places += [mine, behind + 1]

    @contextlib.contextmanager
    def only(self) -> Iterator[None]:
        """Within, the model has just the blocks that run."""
        left_out = {id(block) for block in self.blocks} - {id(block) for block in self.run}
        parents = {id(part): part for key, part in self.lists.items() if key in left_out}
        before = [(part, dict(part._modules)) for part in parents.values()]
        try:
            for part, children in before:
                kept = [child for child in children.values() if id(child) not in left_out]
                part._modules.clear()
                part._modules.update({str(number): child for number, child in enumerate(kept)})
            yield
        finally:
            for part, children in before:
                part._modules.clear()
                part._modules.update(children)


def _kind(block: nn.Module) -> Any:
    """Equal for blocks that compute the same: classes, shapes and plain settings of all their parts, and whether their
    activations are computed again, which replaces their forward.
    """
    parts: list[Any] = ["forward" in vars(block)]
    for name, part in block.named_modules():
        plain = tuple(
            (key, value)
            for key, value in vars(part).items()
            if isinstance(value, _PLAIN) and not key.startswith("_") and key not in _OF_PLACE
        )
        tensors = (*part._parameters.items(), *part._buffers.items())
        shapes = tuple((key, t.shape, t.dtype, t.requires_grad) for key, t in tensors if t is not None)
        parts.append((name, type(part), plain, shapes))
    return tuple(parts)
