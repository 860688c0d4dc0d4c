"""Whether a model can keep the documents of a packed sample out of each other's attention."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_FULL_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class _ReachedError(Exception):
    """The forward pass came to the place looked for."""


def follows_positions(model: Any) -> bool:
    """Whether positions that restart make a causal model attend within each document only.

    transformers finds documents by their positions where it makes the causal mask, if it gets no
    attention mask and no cache. Whether a model's forward hands its positions on to that place is
    tried here, without computing anything. A recurrent model carries its state over a boundary
    whatever the mask says.

    Args:
        model: on the meta device.
    """
    if _recurrent(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    return _reaches(model, "find_packed_sequence_indices", position_ids=_meta([[0, 0]]))


def without_search(model: Any) -> Any:
    """Spare `model` the search for documents where it numbers the positions itself, so that there is only one.

    transformers searches in each forward pass, and has the host wait for the device to learn that nothing was
    found; under torch.compile it keeps the mask instead, and attention misses its fast path.

    Args:
        model: the whole of it, whose forward is called with keywords.
    """
    from transformers import masking_utils

    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:
        return model
    if not isinstance(search, _Search):
        search = masking_utils.find_packed_sequence_indices = _Search(search)
    model.register_forward_pre_hook(search.begin, with_kwargs=True)
    model.register_forward_hook(search.end, always_call=True)
    return model


class _Search:
    """Stands in for the search of transformers, for all models; those without the hooks don't notice."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._needless = False

    def begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._needless = kwargs.get("position_ids") is None

    def end(self, module: Any, args: Any, outputs: Any) -> None:
        self._needless = False

    def __call__(self, position_ids: Tensor) -> Any:
        return None if self._needless else self._original(position_ids)


def takes_pair_mask(model: Any) -> bool:
    """Whether a bidirectional model takes a mask [batch, 1, query, key] as it is.

    Args:
        model: on the meta device.
    """
    config = model.config
    if _recurrent(model) or getattr(config, "sliding_window", None) or getattr(config, "local_attention", None):
        return False  # such a mask would replace the window
    if config._attn_implementation not in ("eager", "sdpa"):
        return False
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device="meta")
    return _reaches(model, "_preprocess_mask_arguments", attention_mask=mask)


def pair_mask(documents: Tensor, additive: bool) -> Tensor:
    """Which positions see each other: those of one document.

    Args:
        documents: int64 [batch, n], the document of each position.
        additive: as float32 to be added to scores (eager attention), else as bool (sdpa).

    Returns:
        [batch, 1, n, n].
    """
    same = (documents[:, None, :, None] == documents[:, None, None, :]).contiguous()
    if not additive:
        return same
    return torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)


def _recurrent(model: Any) -> bool:
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return bool(getattr(model, "_is_stateful", False)) or not set(kinds) <= _FULL_ATTENTION


def _reaches(model: Any, place: str, **inputs: Tensor) -> bool:
    from transformers import masking_utils

    if not hasattr(masking_utils, place):
        return False
    with _tripwire(masking_utils, place), torch.no_grad():
        try:
            model(input_ids=_meta([[0, 0]]), **inputs)
        except _ReachedError:
            return True
        except Exception:  # a model that can't run without values doesn't get there this way
            return False
    return False


@contextlib.contextmanager
def _tripwire(module: Any, place: str) -> Iterator[None]:
    def reached(*args: Any, **kwargs: Any) -> None:
        raise _ReachedError

    original = getattr(module, place)
    setattr(module, place, reached)
    try:
        yield
    finally:
        setattr(module, place, original)


def _meta(values: list[list[int]]) -> Tensor:
    return torch.tensor(values).to("meta")
