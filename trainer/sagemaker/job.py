"""What SageMaker says to a process of a training job, whichever of its toolkits started it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from trainer.sagemaker.hyperparameters import overrides_of, written

_TRAIN = ("train", "training")
_HELD_OUT = ("validation", "valid", "val", "eval", "test")
CODE = ("code", "sm_drivers")
"""Channels that hold programs."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training job, as its container shows it."""

    hyperparameters: Mapping[str, Any]
    channels: Mapping[str, Path]
    """Folders by the name of their channel; those with programs left out."""
    model_dir: Path
    """What is there at the end is the job's model."""
    output_dir: Path
    checkpoints: Path | None
    """The folder that is kept in S3 while the job runs; None: the job was made without one."""
    cache: Path | None
    """What a warm pool keeps for the next job."""

    @classmethod
    def from_env(cls, variables: Mapping[str, str] = os.environ) -> TrainingJob | None:
        """None: this is no training job.

        Raises:
            ConfigError: a variable isn't what SageMaker writes.
        """
        if "SM_HPS" not in variables:
            return None
        base = Path(variables.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
        names = _json(variables, "SM_CHANNELS", [])
        folders = {name: variables.get(f"SM_CHANNEL_{name.upper()}", base / "input" / "data" / name) for name in names}
        cache = variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY")
        checkpoints = base / "checkpoints"
        return cls(
            hyperparameters=_json(variables, "SM_HPS", {}),
            channels={name: Path(folder) for name, folder in folders.items() if name not in CODE},
            model_dir=Path(variables.get("SM_MODEL_DIR") or base / "model"),
            output_dir=Path(variables.get("SM_OUTPUT_DIR") or base / "output"),
            checkpoints=checkpoints if checkpoints.is_dir() else None,
            cache=Path(cache) if cache else None,
        )

    def overrides(self) -> list[str]:
        """What its hyperparameters say.

        Raises:
            ConfigError: one of them is no key.
        """
        return overrides_of(self.hyperparameters)

    def defaults(self) -> list[str]:
        """Where things go unless the hyperparameters say otherwise."""
        folder = self.checkpoints or self.output_dir / "data" / "run"
        found = [f"run.dir={written(str(folder))}"]
        if self.cache is not None:
            found.append(f"cache={written(str(self.cache / 'shardwright'))}")
        return found


def _json(variables: Mapping[str, str], name: str, default: Any) -> Any:
    try:
        value = json.loads(variables.get(name) or json.dumps(default))
    except ValueError:
        value = None
    if not isinstance(value, type(default)):
        raise ConfigError(
            f"SageMaker: {name}={variables[name][:100]!r} is not JSON of the kind that SageMaker writes. "
            f"Leave its variables alone ({name})."
        )
    return value


def words_of(arguments: Sequence[str]) -> list[str]:
    """Of a command line those words that no toolkit made of hyperparameters: `key=value`, not behind a `--name`."""
    words, behind = [], False
    for argument in arguments:
        flag = argument.startswith("-")
        if not flag and not behind and "=" in argument:
            words.append(argument)
        behind = flag and "=" not in argument
    return words


def channel_overrides(channels: Mapping[str, Path], data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Settings of the data that channels fill in, and the names of the channels that nothing took.

    Args:
        channels: folders by name.
        data: the chosen data's settings; one that has to be given is `???`.

    Raises:
        ConfigError: the folder of a channel that is needed isn't there, or holds nothing.
    """
    words: list[str] = []
    unused: list[str] = []
    for name, folder in channels.items():
        prefix = "validation_" if name in _HELD_OUT else "" if name in _TRAIN or len(channels) == 1 else None
        key = None if prefix is None else _open_key(data, prefix)
        if key is None:
            unused.append(name)
            continue
        _refuse_empty(name, folder)
        words.append(f"data.{key}={_filled(key, folder)}")
    return words, unused


def _open_key(data: Mapping[str, Any], prefix: str) -> str | None:
    """The setting that nobody has given."""
    keys = [f"{prefix}{key}" for key in ("files", "paths", "path") if f"{prefix}{key}" in data]
    needed = next((key for key in keys if data[key] == "???"), None)
    return needed or next((key for key in keys if data[key] in (None, [])), None) if keys else None


def _filled(key: str, folder: Path) -> str:
    if key.endswith("path"):
        return written(str(folder))
    return written([str(folder / "**" / "*")] if key.endswith("files") else [str(folder)])


def _refuse_empty(name: str, folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ConfigError(
            f"SageMaker: the channel {name} has no file at {folder}. Give it an S3 prefix that holds some, in the mode "
            f"File or FastFile (channel {name})."
        )
