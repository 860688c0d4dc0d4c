"""The file whose beginning SageMaker shows as the reason of a job's failure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer.secrets import hidden

_SHOWN = 1024
"""Characters that the service shows."""


def write_failure(reason: str, variables: Mapping[str, str] = os.environ) -> None:
    """Say why this job failed; nothing outside of SageMaker, and nothing where it was said already.

    The toolkits leave a file alone that is there, and so does every other rank: the first one knows best.
    """
    told = variables.get("SM_OUTPUT_FAILURE") or (f"{variables['SM_OUTPUT_DIR']}/failure" if _inside(variables) else "")
    if not told:
        return
    path = Path(told)
    with contextlib.suppress(OSError):  # a full disk may be the reason: it is on the console too
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(hidden(" ".join(reason.split()))[:_SHOWN])


@contextlib.contextmanager
def failing_noted() -> Iterator[None]:
    """Around a run: what nobody expected is written down too, before Python shows its traceback."""
    try:
        yield
    except Exception as error:
        write_failure(f"{type(error).__name__}: {error}")
        raise


def _inside(variables: Mapping[str, str]) -> bool:
    return "SM_HPS" in variables and "SM_OUTPUT_DIR" in variables
