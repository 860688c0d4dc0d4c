"""The errors that carry a meaning for the person who started the run."""

from __future__ import annotations


class ConfigError(Exception):
    """The input is wrong: a setting, a file, or two settings that contradict each other.

    The message is one line: `Where: what is wrong, with the values. What to do (config key).`
    The entry points print it once, without a traceback, and exit with code 2 on every rank.
    """


class TrainingError(Exception):
    """The run can't go on for a reason that isn't the user's input; exit code 1."""
