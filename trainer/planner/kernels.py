"""Operators as a device runs them: which kernels stand for attention and dropout there, and what each one costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from strategies.precision import Precision


class Kind(Enum):
    """What bounds an operator's time."""

    matmul = "matmul"
    attention_forward = "attention_forward"
    attention_backward = "attention_backward"
    memory = "memory"


@dataclass(frozen=True, slots=True)
class Call:
    """One operator."""

    kind: Kind
    flops: float
    """A multiplication and an addition are two; what a causal mask hides isn't computed."""
    bytes: int
    """Read and written."""


_FP32_IN_AUTOCAST = frozenset(
    {"softmax", "log_softmax", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "mse_loss", "pow", "exp"}
    | {"rsqrt", "reciprocal", "sum", "prod", "cumsum", "norm", "logsumexp", "softplus", "cosine_similarity"}
)
"""Operators that compute in fp32 in an autocast region on CUDA, and not on CPU: those that models use.

Source: torch's documentation, `amp.html`, "CUDA Ops that can autocast to float32".
"""


class As(TorchFunctionMode):
    """Within, operators on CPU tensors are those that `device` would run."""

    def __init__(self, device: str, precision: Precision | None) -> None:
        """`precision`: whose autocast is on; None: no autocast."""
        super().__init__()
        self._cuda = device == "cuda"
        self._autocast = precision is not None and precision.compute_dtype is not precision.master_dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._cuda:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.dropout:
            return _dropout(*args, **kwargs)
        if self._autocast and torch.is_autocast_enabled("cpu") and function.__name__ in _FP32_IN_AUTOCAST:
            args = tuple(_as_fp32(each) for each in args)
        return function(*args, **kwargs)


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    return input if not training or p == 0 else torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch's `scaled_dot_product_attention` chooses on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] <= 256:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return found
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return found


_ROW_ON_CHIP = 48 << 10
"""Bytes of a row that a CUDA block keeps in shared memory (torch: aten/src/ATen/native/cuda/SoftMax.cu)."""

_FREE = frozenset(
    {"aten.detach", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}
    | {"aten._unsafe_view", "aten.lift_fresh", "aten.alias", "aten.resize_", "aten._reshape_alias", "aten.set_"}
    | {"aten.scalar_tensor", "aten._local_scalar_dense", "aten.sym_size", "aten.is_same_size"}
)


def call_of(function: Any, args: Any, kwargs: Any, result: Any) -> Call | None:
    """What an operator costs; None: nothing, as a view."""
    name = str(function.overloadpacket)
    if function.is_view or name in _FREE or function.namespace == "prim":
        return None
    moved = sum(_bytes(each) for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor))
    moved += _read_again(name, args)
    if "scaled_dot_product" in name:
        return _attention_call(name, function, args, kwargs, moved)
    flops = _flops(function, args, kwargs, result)
    if flops:
        return Call(Kind.matmul, flops, moved)
    return Call(Kind.memory, 0.0, moved) if moved else None


def _bytes(tensor: Tensor) -> int:
    """Of its numbers; those that an expanded tensor repeats are read from a cache."""
    repeated = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0)
    return tensor.numel() * tensor.element_size() // max(1, repeated)


def _read_again(name: str, args: Any) -> int:
    """Of a softmax over rows that don't fit on chip: looked through for the maximum, the sum, and the result; in
    backward for the sum and the result.
    """
    if "softmax" not in name or not args or args[0].shape[-1] * args[0].element_size() < _ROW_ON_CHIP:
        return 0
    return {"aten._log_softmax": 2, "aten._softmax": 2}.get(name, 1) * _bytes(args[0])


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(function.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _attention_call(name: str, function: Any, args: Any, kwargs: Any, moved: int) -> Call:
    """Two products in forward; in backward five, since scores are computed again."""
    is_backward = "backward" in name
    tensors = [each for each in args if isinstance(each, Tensor)]
    query, key, value = tensors[1:4] if is_backward else tensors[:3]
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    pairs: float = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if given.get("is_causal") and query.shape[2] == key.shape[2]:
        pairs /= 2
    to_score, to_value = 2.0 * pairs * query.shape[3], 2.0 * pairs * value.shape[3]
    if is_backward:
        return Call(Kind.attention_backward, 3 * to_score + 2 * to_value, moved)
    return Call(Kind.attention_forward, to_score + to_value, moved)
