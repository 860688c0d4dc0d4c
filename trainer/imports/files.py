"""Files of torch.save that others wrote: tensors mapped into memory, and of everything else only what runs no code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from strategies.errors import ConfigError

_STOOD_IN_FOR = "deepspeed."
"""Classes of this package are in its checkpoints: loss scalers, an enumeration, addresses of fragments."""
_PLAIN = {"argparse.Namespace", "types.SimpleNamespace"}
"""What people hand over with their own state; kept, and never looked at."""


class StandIn:
    """What a file says of an object, without the object's class: nothing of that class is imported or run."""

    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> StandIn:
        found = super().__new__(cls)
        found.state = {}
        return found

    def __init__(self, *arguments: Any) -> None:
        """Arguments of the constructor that isn't called."""

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, dict) else {}


def load(path: Path, ignored: Collection[str] = ()) -> Any:
    """What `torch.save` wrote, its tensors mapped into memory: reading the file costs none until they are used.

    Args:
        path: the file.
        ignored: full names of further classes that may stand for nothing.

    Raises:
        ConfigError: it asks for a class or function that isn't needed for tensors and numbers; names it. Or it can't
            be read.
    """
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(path))
        for name in names:
            if not (name.startswith(_STOOD_IN_FOR) or name in _PLAIN or name in ignored):
                raise ConfigError(
                    f"import: {path} asks for {name}, which is neither a tensor nor DeepSpeed's, so it isn't read. If "
                    f"that is a class of yours that the checkpoint doesn't need, leave it out: --ignore {name}."
                )
        # torch compares the names, and makes objects of these instead.
        with safe_globals([_stand_in(name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"import: {path} can't be read: {why}. It must be whole, and written by torch.save in its zip format."
        ) from error


def _stand_in(name: str) -> type[StandIn]:
    module, _, short = name.rpartition(".")
    return type(short, (StandIn,), {"__module__": module, "__qualname__": short})
