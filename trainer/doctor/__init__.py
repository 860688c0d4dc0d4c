"""Looks at every host of a job and at what lies between them, and says what is wrong and what to do."""

from __future__ import annotations

from enum import Enum


class Doctor(Enum):
    """What of it a run does before its model is built."""

    quick = "quick"
