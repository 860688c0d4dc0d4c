"""Memory of the host: whether what is freed stays with the process."""

from __future__ import annotations

import contextlib
import ctypes

import torch

_M_MMAP_THRESHOLD = -3
_MOST = (32 << 20) - (1 << 16)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB, instead of giving them back to be handed them again page by page.

    It learns from the largest block that was freed so far (mallopt(3): M_MMAP_THRESHOLD), so without this the speed
    of a loop hangs on what happened before it. No effect where a user's own variables (MALLOC_MMAP_THRESHOLD_,
    GLIBC_TUNABLES) fix the thresholds, or where there is no glibc; the block's pages are never touched.
    """
    torch.empty(_MOST, dtype=torch.uint8)


def give_back_freed_memory() -> None:
    """Have glibc give back blocks of 1 MiB or more when they are freed, for work that holds one large thing at a time.

    No effect where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
