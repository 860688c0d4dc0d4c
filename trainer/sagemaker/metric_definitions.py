"""How SageMaker reads the numbers of a run from its log: a regex for each, over the lines that the display prints."""

from __future__ import annotations

MOST = 40
"""Of a job; the service's limit."""
LONGEST = 500
"""Characters of a regex; the service's limit."""

# Whole numbers of Python's `.4g`. A `nan` or `inf` is no number for a chart, nor for a tuning job: no point is drawn.
_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)(?=\s|$)"
# Only after a step of ours; what an mpirun puts before a line doesn't matter.
_LINE = r"\bstep=[0-9]+(?:/[0-9]+)? (?:\S+ )*?"
_LOGGED = ("loss", "grad_norm", "lr", "tokens_per_s", "samples_per_s", "step_s", "mfu", "memory_mib")
_EVALUATED = ("val_loss", "val_accuracy", "ema_val_loss", "ema_val_accuracy")


def metric_definitions() -> dict[str, str]:
    """Name of each metric -> its regex, whose first group is the value."""
    found = {"step": r"\bstep=([0-9]+)(?:/[0-9]+)? \S+="}
    return found | {name: regex_of(name) for name in (*_LOGGED, *_EVALUATED)}


def regex_of(name: str) -> str:
    """The regex for a metric that the display prints under this name."""
    escaped = "".join(letter if letter.isalnum() or letter == "_" else f"\\{letter}" for letter in name)
    return f"{_LINE}{escaped}={_NUMBER}"


def as_request(definitions: dict[str, str]) -> list[dict[str, str]]:
    """In the form in which the service and its SDK take them."""
    return [{"Name": name, "Regex": regex} for name, regex in definitions.items()]
