"""`metrics.jsonl`: the record of a run, one JSON object per logged step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Line = dict[str, Any]
"""What one line says: `step` as int, everything else as float."""


class MetricsFile:
    """Writes `metrics.jsonl`, so that at every moment each step stands in it exactly once.

    A number that isn't finite is written as the string "NaN", "Infinity" or "-Infinity" (as in the
    JSON form of protocol buffers), so that strict readers take the file; `read` turns it back. Each
    line reaches the file when it is written; nothing waits in a buffer.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        """Begin, or go on after `step`: lines of later steps are dropped, as is a line that was torn.

        Args:
            path: of the file; made if it isn't there, with its folder.
            step: 0 for a fresh run.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        self.reached = self.rewind(step)
        """The last step that stood in the file before this start; 0: none did."""

    def rewind(self, step: int) -> int:
        """Drop what was written after `step`; in one go, so that a crash leaves the old file or the new one.

        Returns:
            The last step that stood there; 0: none did.
        """
        self.close()
        found = read(self._path)
        kept = [line for line in found if line["step"] <= step]
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(_encode(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._last = kept[-1] if kept else None
        self._file = self._path.open("r+b")
        self._end = self._file.seek(0, os.SEEK_END)
        self._begin = self._end - (len(_encode(self._last)) if self._last else 0)
        return int(found[-1]["step"]) if found else 0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; metrics of the step that was written last go into its line.

        Writing a step before the last one means that the run went back: what came after is dropped.

        Raises:
            OSError: the disk is full or gone.
        """
        assert self._file is not None, "write() after close()"
        if self._last is not None and step < self._last["step"]:
            self.rewind(step)
        again = self._last is not None and self._last["step"] == step
        before = self._last if again and self._last is not None else {}
        line: Line = {"step": step, **before, **metrics}
        data = _encode(line)
        # The longer line begins with the bytes of the shorter one: a crash in between can only tear its end.
        self._begin = self._begin if again else self._end
        self._file.seek(self._begin)
        self._file.write(data)
        self._file.flush()
        if self._begin + len(data) < self._end:
            self._file.truncate()
        self._end = self._begin + len(data)
        self._last = line

    def close(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`, in order; unreadable ones (torn by a crash) left out; [] without a file."""
    return [decoded(line) for line in objects(path) if isinstance(line.get("step"), int)]


def decoded(line: Mapping[str, Any]) -> Line:
    """A line with numbers for the words that stand for them in the file."""
    return {key: _WORDS.get(value, value) if isinstance(value, str) else value for key, value in line.items()}


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that has one in each line; unreadable lines left out; none without a file."""
    for raw in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if isinstance(line, dict):
                yield line


def _encode(line: Line) -> bytes:
    return json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
