"""Importing large libraries without looking for garbage on the way."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def first_import_of(module: str) -> Iterator[None]:
    """Around the first import of something large; nothing at all where `module` was imported before.

    A million objects come, and all of them stay. The collector would go over them again and again, a fifth of
    the time that importing takes; and ever after, which is why they are taken out of its sight.

    Args:
        module: what the block imports, itself or through something else.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
