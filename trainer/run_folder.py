"""One folder for a run: chosen once, agreed by all ranks, and what lies in it besides the training's own files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from strategies.errors import ConfigError
from strategies.world import Launch, World, open_store, publish
from trainer.place import at_home
from trainer.secrets import redacted_words

_PATIENCE_S = 10.0
_IDENTITY = ("model", "data", "optimizer", "schedule", "precision", "seed")
_PACKAGES = ("shardwright", "torch", "transformers", "datasets", "accelerate", "hydra-core", "omegaconf", "numpy",
             "safetensors", "tokenizers", "peft", "deepspeed", "horovod")  # fmt: skip


class RunFolder:
    """The run's folder, held by this run alone until `close`."""

    def __init__(self, path: Path, launch: Launch, number: int) -> None:
        self.path = path
        self.number = number
        """Of this run among those of the launch, which may be several in a script or a notebook."""
        self._lock = FileLock(path / ".lock") if launch.rank == 0 else None

    @classmethod
    def claim(cls, directory: str | None, name: str) -> RunFolder:
        """Rank 0 decides, makes and locks the folder; every rank gets the same. Needs no process group.

        Args:
            directory: `run.dir`; None: `runs/<name>` below the working directory of rank 0.
            name: used where `directory` is None.

        Raises:
            ConfigError: it can't be made or written, or another run holds it; on every rank.
        """
        launch = Launch.from_env()
        store = open_store(launch)
        number = store.add(f"runs/{launch.rank}", 1)
        held: list[RunFolder] = []

        def decide() -> str:
            folder = cls(at_home(directory or Path("runs") / name).absolute(), launch, number)
            folder._make()
            held.append(folder)
            return str(folder.path)

        path = publish(store, launch, f"run_folder/{number}", decide)
        return held[0] if held else cls(Path(path), launch, number)

    def _make(self) -> None:
        assert self._lock is not None
        with self.writing():
            for part in ("logs", "checkpoints", "plots"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                self._wait()

    def _wait(self) -> None:
        """Ranks whose launcher was killed may still be writing their last checkpoint."""
        assert self._lock is not None
        sys.stderr.write(f"waiting {_PATIENCE_S:.0f} s for another run to leave {self.path}\n")
        try:
            self._lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            raise ConfigError(
                f"Run: another run is writing to {self.path}. Wait for it, or choose another folder (run.dir)."
            ) from None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the first writing into the folder.

        Raises:
            ConfigError: it can't be written.
        """
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"Run: the folder {self.path} can't be written: {error}. Free space, or choose another (run.dir)."
            ) from error

    def close(self) -> None:
        """Let go of the folder; may be called twice."""
        if self._lock is not None:
            self._lock.release()


def run_name(config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """A name that is the same for the same job: what is trained, on what, and a digest of how.

    How long, how often logged, and how spread doesn't count, so that these may change between starts.
    """
    trained = {key: config.get(key) for key in _IDENTITY}
    trained["global_batch"] = config.get("trainer", {}).get("global_batch")
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return f"{choices.get('model', 'model')}-{choices.get('data', 'data')}-{digest}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], groups: Collection[str] = ()) -> list[str]:
    """`key: old -> new` for each leaf that differs.

    Args:
        old: a configuration.
        new: another one.
        groups: where another class was chosen: its keys aren't missed, nor news.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    shared = before.keys() & after.keys()
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        if key in shared or key.partition(".")[0] not in groups
    ]


_ABSENT = object()


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, Mapping) or not tree:
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def describe(folder: Path, config: Mapping[str, Any], world: World) -> None:
    """Write `config.yaml` and `environment.json`, of the newest start that came as far as its first step."""
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(describe_environment(world), indent=1))


def describe_environment(world: World) -> dict[str, Any]:
    """Versions, machine, commit: what somebody needs to know who looks at this run in a year."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "command": redacted_words(sys.argv),
        "git": git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Of those that decide what a run does, where they are installed."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the working directory, `+` where files differ from it; None outside of git."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
