"""The configurations of many jobs, checked by one start of the script that runs them, which alone knows its Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

VARIABLE = "SHARDWRIGHT_CHECK"
"""Names a file with the jobs; `trainer.run` then checks them and trains nothing."""


def refuse_wrong_jobs(script: Path, jobs: Mapping[str, Sequence[str]]) -> None:
    """Have `script` compose the configuration of each job.

    Args:
        script: calls `trainer.run`.
        jobs: what to call a job -> its words.

    Raises:
        ConfigError: one of them is wrong, or the script can't say.
    """
    from strategies.errors import ConfigError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps({name: list(words) for name, words in jobs.items()}))
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, VARIABLE: str(path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if _answer(path).exists():
            return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    wrong = next((line for line in lines if line.startswith("ConfigError: ")), None)
    if wrong is not None:
        raise ConfigError(wrong.removeprefix("ConfigError: "))
    raise ConfigError(
        f"launch: {script} can't check the jobs' configurations, exit code {done.returncode}: "
        f"{lines[-1].strip() if lines else 'it never called trainer.run'}. Start it alone to see more (--script)."
    )


def asked_for() -> Path | None:
    """The file with the jobs, in a process that was started to check them."""
    path = os.environ.pop(VARIABLE, None)
    return None if path is None else Path(path)


def check(path: Path, one: Callable[[list[str]], None]) -> None:
    """Check them all.

    Args:
        path: of the file.
        one: checks the words of one.

    Raises:
        ConfigError: what is wrong with the first that is wrong, and which that is.
    """
    from strategies.errors import ConfigError

    for name, words in json.loads(path.read_text()).items():
        try:
            one(words)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    _answer(path).touch()


def _answer(path: Path) -> Path:
    return path.with_name("checked")
