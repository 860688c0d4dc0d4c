"""Random streams: one seed decides all of them, and each rank has its own."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its arguments.

    Args:
        seed: the run's seed.
        parts: what the stream is for, such as a rank and a step.
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed torch (CPU and every device), numpy's global stream and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture(device: torch.device) -> dict[str, Tensor]:
    """The state of this rank's streams as tensors on CPU."""
    known = np.random.get_state(legacy=False)
    keys, position = known["state"]["key"], known["state"]["pos"]
    has_gauss, cached = known["has_gauss"], known["gauss"]
    _, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.concatenate([keys.astype(np.int64), [position, has_gauss]])),
        "numpy_gauss": torch.tensor(float(cached), dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `capture` gave."""
    torch.set_rng_state(state["torch"])
    words = state["numpy"].numpy()
    np.random.set_state(
        ("MT19937", words[:-2].astype(np.uint32), int(words[-2]), int(words[-1]), float(state["numpy_gauss"]))
    )
    gauss = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if np.isnan(gauss) else gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
