"""Starts of the launcher as somebody else sees them: how they end, how long that takes, what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.plan import Fault, environment_of

ROOT = Path(__file__).resolve().parents[2]
VICTIM = Path(__file__).with_name("victim.py")
_MARK = "SHARDWRIGHT_FAULTS_START"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a start ended."""

    code: int | None
    """Of the launcher; negative: the signal that ended it; None: it had to be killed."""
    seconds: float
    """From the start until nothing of it was left."""
    struck: list[dict[str, Any]] = field(default_factory=list)
    """The faults that struck, in order."""
    took_s: float | None = None
    """From the last fault until nothing of it was left."""
    left: int = 0
    """Processes that were still there when patience ended; they were killed."""


def start(
    words: Sequence[str],
    log: Path,
    faults: Sequence[Fault] = (),
    *,
    processes: int = 2,
    max_restarts: int = 0,
    script: Path = VICTIM,
    patience_s: float = 180.0,
    end_within_s: float = 30.0,
) -> Ending:
    """Launch `script` with `faults` and wait until no process of it is left.

    Args:
        words: `key=value` for the job.
        log: file that gets what is printed; `<log>.faults` gets the faults that struck.
        faults: see `plan`.
        processes: ranks.
        max_restarts: of the launcher.
        script: calls `trainer.run`, under the kit.
        patience_s: a start without a fault in it may take this long.
        end_within_s: from a fault that ends the launch until all processes must be gone; with restarts, no limit.
    """
    strikes, mark = log.with_name(f"{log.name}.faults"), uuid.uuid4().hex
    command = [sys.executable, "-c", "from trainer.cli import main; main()", "launch", "--nproc-per-node",
               str(processes), "--max-restarts", str(max_restarts), "--script", str(script), *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", _MARK: mark, **environment_of(faults, strikes)}
    strikes.unlink(missing_ok=True)
    begin = time.time()
    with log.open("ab") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    deadline, hit = begin + patience_s, list[dict[str, Any]]()
    while True:
        time.sleep(0.03)
        hit = hit if len(hit) == len(faults) else _lines(strikes)
        if hit and max_restarts == 0:
            deadline = min(deadline, max(entry["at"] for entry in hit) + end_within_s)
        if launcher.poll() is not None and not (left := _processes(mark)):
            break
        if time.time() > deadline:
            left = _processes(mark)
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            launcher.wait()
            hit = _lines(strikes)
            return Ending(code=None, seconds=time.time() - begin, struck=hit, took_s=_since(hit), left=len(left))
    hit = _lines(strikes)
    return Ending(code=launcher.returncode, seconds=time.time() - begin, struck=hit, took_s=_since(hit))


def _since(hit: Sequence[dict[str, Any]]) -> float | None:
    return time.time() - hit[-1]["at"] if hit else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _processes(mark: str) -> list[psutil.Process]:
    """What lives of a start; also orphans, which no launcher leads to."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
