"""The errors that carry a meaning for the person who started the run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """The input is wrong: a setting, a file, or two settings that contradict each other.

    The message is one line: `Where: what is wrong, with the values. What to do (config key).`
    The entry points print it once, without a traceback, and exit with code 2 on every rank.
    """


class TrainingError(Exception):
    """The run can't go on for a reason that isn't the user's input; exit code 1."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`Nearest: a, b.` for an error message, or the choices where nothing is near."""
    known = sorted(choices)
    if not known:
        return "There is nothing to choose from here."
    near = difflib.get_close_matches(word, known, n=3)
    return f"Nearest: {', '.join(near)}." if near else f"Choices: {', '.join(known[:40])}."
