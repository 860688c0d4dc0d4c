"""Where a run's files lie, as its configuration says it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from strategies.errors import ConfigError


@dataclass(kw_only=True)
class Run:
    """Where a run's files lie."""

    dir: str | None = None
    """The run's folder; null: `runs/<name>`."""
    name: str | None = None
    """null: made from the model, the data and a digest of the settings that decide what is learned."""

    def __post_init__(self) -> None:
        if self.dir is not None and self.name is not None:
            raise ConfigError(
                f"Run: name={self.name} only makes the folder's name, and dir={self.dir} names the folder. "
                "Leave one out (run.name, run.dir)."
            )
        if self.dir is not None and not self.dir.strip():
            raise ConfigError(f"Run: dir={self.dir!r} names no folder. Give one, or null for runs/<name> (run.dir).")
        if self.name is not None and (not self.name.strip() or self.name in (".", "..") or "/" in self.name):
            raise ConfigError(
                f"Run: name={self.name!r} can't be a folder's name. Use letters, digits, - and _; for a path there is "
                "run.dir (run.name)."
            )


def at_home(path: str | Path) -> Path:
    """With `~` and `~name` replaced; as in a shell, a name that nobody has stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises
