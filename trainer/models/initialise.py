"""First values of a `transformers` model: a pure function of the seed, wherever the model lies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.errors import ConfigError

_FLAG = "_is_hf_initialized"
"""By this attribute transformers knows what it needn't initialise."""
_aten = torch.ops.aten
_RANDOM = {_aten.normal_.default, _aten.uniform_.default, _aten.bernoulli_.float, _aten.exponential_.default}


class DrawnOnCPU(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws every random tensor whole, with CPU's generator, and puts it where it belongs.

    So an initialisation gives the same numbers on every device, and each rank of a sharded model
    (DTensor) gets its part of what one process would have drawn, or copied.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten.copy_.default and _sharded(args[0]) and not _sharded(args[1]):
            put(args[0], args[1].expand(args[0].shape))
            return args[0]
        if func not in _RANDOM or (args[0].device.type == "cpu" and not _sharded(args[0])):
            return func(*args, **(kwargs or {}))
        target = args[0]
        drawn = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        func(drawn, *args[1:], **(kwargs or {}))
        put(target, drawn)
        return target


def _sharded(value: Tensor) -> bool:
    return hasattr(value, "placements")


def own_part(target: Tensor) -> tuple[Tensor, Any]:
    """What this rank holds of `target`, and the index of it in the whole."""
    if not _sharded(target):
        return target, ...
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(target, DTensor)
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return target.to_local(), tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))


@torch.no_grad()
def put(target: Tensor, value: Any) -> None:
    """Copy a whole `value` into `target`, which may be sharded (each rank has the same `value`).

    Args:
        target: a tensor of the model.
        value: a tensor of the same shape, or what gives one when it is indexed.
    """
    local, part = own_part(target)
    if local.numel():
        local.copy_(value[part])


def initialise(model: nn.Module, seed: int) -> None:
    """Give a `transformers` model (with or without adapters of `peft`) fresh values.

    Weights come from the architecture's own rules; buffers that aren't stored, such as rotary
    frequencies, are computed again, and tied weights are tied.

    Args:
        model: with storage, sharded or not.
        seed: decides every value; the global random stream isn't touched.

    Raises:
        ConfigError: the architecture says of some weight nothing.
    """
    base = bare(model)
    base.tie_weights()
    _unmark(base)
    _mark_aliases(base)
    _mark_adapters(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))
    with _drawing(seed):
        _apply_rules(base)
        _reset_adapters(model)
    _check_complete(model, dict(model.named_parameters()))


def initialise_adapters(model: nn.Module, seed: int) -> None:
    """Give only the adapters fresh values; the global random stream isn't touched."""
    with _drawing(seed):
        _reset_adapters(model)


def initialise_rest(model: nn.Module, known: Iterable[Tensor], seed: int) -> None:
    """Give fresh values to all that isn't `known`, and compute the buffers that aren't stored.

    Args:
        model: with storage, sharded or not; with or without adapters.
        known: parameters and buffers of it that have their values.
        seed: decides every other value; the global random stream isn't touched.

    Raises:
        ConfigError: the architecture says nothing of some weight that isn't known.
    """
    base = bare(model)
    base.tie_weights()
    _unmark(base)
    _mark_aliases(base)
    _mark_adapters(base)
    for value in known:
        setattr(value, _FLAG, True)
    rest = {name: value for name, value in model.named_parameters() if not getattr(value, _FLAG, False)}
    with torch.no_grad():
        for value in rest.values():
            if value.is_floating_point():
                value.fill_(float("nan"))
    with _drawing(seed):
        _apply_rules(base)
    initialise_adapters(model, seed)
    _check_complete(model, rest)


def copy_values(target: nn.Module, source: nn.Module) -> None:
    """Copy every parameter and buffer of `source`, also those that aren't stored, into `target`.

    Args:
        target: with storage, sharded or not; names as in `source`.
        source: whole, the same on every rank.
    """
    bare(target).tie_weights()
    values: Mapping[str, Tensor] = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in (*target.named_parameters(), *target.named_buffers()):
        put(tensor.detach(), values[name].detach())


def bare(model: nn.Module) -> Any:
    """The `transformers` model inside that of `peft`."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


@contextlib.contextmanager
def _drawing(seed: int) -> Iterator[None]:
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        with DrawnOnCPU():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.default_generator.set_state(state)


def _apply_rules(base: Any) -> None:
    """Let each module be initialised by the rules of the `PreTrainedModel` to which it belongs, inner ones first.

    As `initialize_weights` does it; that takes a model under `fully_shard` for foreign code, and leaves modules out.
    """
    from transformers.initialization import guard_torch_init_functions

    def visit(module: Any, rules: Callable[[nn.Module], None]) -> None:
        rules = getattr(module, "_init_weights", rules)
        for child in module.children():
            visit(child, rules)
        if not getattr(module, _FLAG, False):
            _on_whole(rules, module)
            setattr(module, _FLAG, True)

    with torch.no_grad(), guard_torch_init_functions():
        visit(base, base._init_weights)


def _on_whole(rules: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Apply `rules` to `module` as if its parameters weren't sharded.

    Rules may index parameters or overwrite them with plain tensors, which shards don't allow. So each rank holds the
    whole of what belongs to one module directly (a layer's weight and bias), and keeps its part.
    """
    shards = {
        name: value
        for name, value in module.named_parameters(recurse=False)
        if _sharded(value) and not getattr(value, _FLAG, False)
    }
    for name, value in shards.items():
        whole = torch.full(value.shape, float("nan"), dtype=value.dtype)
        module._parameters[name] = nn.Parameter(whole, requires_grad=value.requires_grad)
    try:
        rules(module)
        for name, value in shards.items():
            put(value.detach(), module.get_parameter(name).detach())
    finally:
        module._parameters.update(shards)


def _reset_adapters(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            for name in module.active_adapters:
                module.reset_lora_parameters(name, True)


def _unmark(model: nn.Module) -> None:
    for part in (*model.modules(), *model.parameters(), *model.buffers()):
        if getattr(part, _FLAG, False):
            delattr(part, _FLAG)


def _mark_aliases(model: Any) -> None:
    """A head tied to the embedding mustn't be initialised as a head, over the embedding's values."""
    aliases = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    for name in {alias.rpartition(".")[0] for alias in aliases}:
        module = model.get_submodule(name)
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if own and all(key in aliases for key in own):
            setattr(module, _FLAG, True)


def _mark_adapters(model: Any) -> None:
    """Adapters have rules of their own, and the frozen values are to be those of the model without them."""
    for layer in model.modules():
        if hasattr(layer, "reset_lora_parameters"):
            for name in layer.adapter_layer_names:
                for module in getattr(layer, name).modules():
                    setattr(module, _FLAG, True)


def _check_complete(model: nn.Module, drawn: Mapping[str, Tensor]) -> None:
    for name, parameter in drawn.items():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if bool(torch.isnan(local.detach()).any()):
            raise ConfigError(
                f"HFModel: {type(bare(model)).__name__} has no rule for the first value of {name!r}. "
                "Use a strategy that builds models plainly, such as ddp, or a pretrained model (strategy, model.path)."
            )
