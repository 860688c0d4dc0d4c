"""The parts of a model that are taken one at a time: gathered, compiled, or computed again in backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from strategies.errors import ConfigError


def find_blocks(model: nn.Module, classes: Sequence[str] = (), min_parameters: int | None = None) -> list[nn.Module]:
    """The blocks of `model`, none inside another, in the order in which the model names them.

    Args:
        model: also one on the meta device.
        classes: names of the blocks' classes; empty: what the model says of itself (`_no_split_modules` of
            transformers), else the members of its `nn.ModuleList`s.
        min_parameters: the smallest modules that have at least so many, instead.

    Returns:
        Never the model itself; empty where it has no such parts.

    Raises:
        ConfigError: the model has no module of a class in `classes`; the name that it lacks.
    """
    if min_parameters is not None:
        return _smallest(model, min_parameters)
    known = {type(part).__name__ for part in model.modules()}
    for name in classes:
        if name not in known:
            raise ConfigError(
                f"Blocks: the model has no module of class {name!r}. It has {', '.join(sorted(known))} (strategy.wrap)."
            )
    wanted = set(classes) or _named_by_itself(model) & known
    if wanted:
        return _outermost(model, lambda part: type(part).__name__ in wanted)
    members = {id(child) for part in model.modules() if isinstance(part, nn.ModuleList) for child in part}
    return _outermost(model, lambda part: id(part) in members)


def with_own_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of `blocks` that share no parameter with another part of `model`, such as a tied embedding."""
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))

    def alone(block: nn.Module) -> bool:
        mine = Counter(id(value) for _, value in block.named_parameters(remove_duplicate=False))
        return all(uses[key] == count for key, count in mine.items())

    return [block for block in blocks if alone(block)]


def _named_by_itself(model: nn.Module) -> set[str]:
    return {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}

    def look(part: nn.Module) -> None:
        for child in part.children():
            if wanted(child):
                found[id(child)] = child
            else:
                look(child)

    look(model)
    return list(found.values())


def _smallest(model: nn.Module, min_parameters: int) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}

    def look(part: nn.Module) -> None:
        large = [child for child in part.children() if _size(child) >= min_parameters]
        if not large and part is not model and not isinstance(part, _CONTAINERS):
            found[id(part)] = part
        for child in large:
            look(child)

    look(model)
    return list(found.values())


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""They have no forward of their own, where a block would be gathered."""


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
