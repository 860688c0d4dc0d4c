"""Asking something that may never answer: a store behind a broken cable, a disk, a device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T], otherwise: T) -> T:
    """What `function` gives, or `otherwise` where it fails or takes longer; then it is left behind in its thread."""
    found: list[T] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            found.append(function())

    thread = threading.Thread(target=call, name="bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else otherwise
