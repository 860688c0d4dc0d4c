"""A table of a run's numbers, for spreadsheets."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from strategies.errors import ConfigError
from trainer.metrics.base import AbstractLogger

_Row = dict[str, Any]


@dataclass(kw_only=True)
class CSVLogger(AbstractLogger):
    """One row per step, one column per metric; empty where a metric wasn't measured."""

    file: str = "metrics.csv"
    """Name within the run's folder."""

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or not self.file.endswith(".csv"):
            raise ConfigError(
                f"CSVLogger: file={self.file!r} is not the name of a .csv file in the run's folder. "
                "Try metrics.csv (logger.csv.file)."
            )
        self._path = Path()
        self._open: TextIO | None = None
        self._columns: list[str] = ["step"]
        self._last: _Row = {}
        self._begin = 0

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._path = folder / self.file
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        try:
            self._rewrite(rows)
        except OSError as error:
            raise ConfigError(
                f"CSVLogger: {self._path} can't be written: {error.strerror}. Choose another name (logger.csv.file)."
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._open is None:
            return
        again = self._last.get("step") == str(step)
        row = {**(self._last if again else {}), "step": str(step), **{key: str(v) for key, v in metrics.items()}}
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            rows = self._rows()
            self._rewrite(rows[:-1] if again else rows)
        elif again:
            self._open.seek(self._begin)
            self._open.truncate()
        self._append(row)

    def text(self, step: int, name: str, text: str) -> None:
        """A table has no place for it."""

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def address(self) -> str:
        return str(self._path)

    def _append(self, row: _Row) -> None:
        assert self._open is not None
        self._begin = self._open.tell()
        csv.DictWriter(self._open, self._columns, lineterminator="\n").writerow(row)
        self._open.flush()
        self._last = row

    def _rows(self) -> list[_Row]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]
        return [row for row in rows if row.get("step", "").isdigit()]

    def _rewrite(self, rows: list[_Row]) -> None:
        self.close()
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[:-1])
        temporary.replace(self._path)
        self._open = self._path.open("r+", newline="")
        self._open.seek(0, os.SEEK_END)
        self._last = {}
        if rows:
            self._append(rows[-1])
