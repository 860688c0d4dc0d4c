"""Reading along in a `metrics.jsonl` that somebody else writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.metrics.jsonl import decoded


class Follower:
    """Reads only what has come since the last look, however long the file is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_again()

    def _begin_again(self) -> None:
        self._inode: int | None = None
        self._at = 0
        """Where the last whole line begins: it may still grow."""
        self.newest: dict[str, float] = {}
        """The newest value of each number."""
        self.curves: dict[str, dict[int, float]] = {}
        """Name -> step -> value, in the order of the steps."""

    def look(self) -> None:
        """Take in what has come. A run that went back has a new file, which is read from the start."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._begin_again()
                    self._inode = inode
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            self._begin_again()
            return
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            self._take(line)
        if whole:
            self._at += whole.rfind(b"\n", 0, -1) + 1

    def _take(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except ValueError:  # torn by a crash
            return
        if isinstance(line, dict) and isinstance(step := line.get("step"), int):
            for name, value in decoded(line).items():
                if isinstance(value, int | float):
                    self.newest[name] = value
                    if name != "step":
                        self.curves.setdefault(name, {})[step] = value
