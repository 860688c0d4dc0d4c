"""`doctor.json` and its picture."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from strategies.errors import ConfigError
from trainer.doctor.examine import Report
from trainer.doctor.picture import draw_links
from trainer.secrets import redacted_words

_MOST_RANKS = 64


def writable(folder: Path, key: str) -> None:
    """Before minutes are spent on what is to be written there.

    Args:
        folder: for both files.
        key: what names it.

    Raises:
        ConfigError: it can't be.
    """
    with _writing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")


def write(report: Report, folder: Path, key: str, *, picture: bool = True) -> None:
    """Both files, the picture where it is asked for and there were pairs to measure.

    Args:
        report: whole.
        folder: for both.
        key: what names it.
        picture: whether to draw.

    Raises:
        ConfigError: the folder can't be written.
    """
    with _writing(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".doctor.json.new"
        unfinished.write_text(json.dumps(_as_json(report), indent=1))
        unfinished.replace(folder / "doctor.json")
        if picture:
            _draw(report, folder / "doctor.png")


def _as_json(report: Report) -> dict[str, object]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "host": platform.node(),
        "command": redacted_words(sys.argv),
        "world_size": len(report.layout.host_of),
        **report.as_json(),
    }


def _draw(report: Report, path: Path) -> None:
    layout, measured = report.layout, report.measured
    links = {**measured.inside.gb_per_s, **measured.between.gb_per_s}
    if not links:
        path.unlink(missing_ok=True)  # of an earlier one
        return
    several = len(layout.names) > 1
    if len(layout.host_of) <= _MOST_RANKS:
        names = [layout.name_of(rank) for rank in range(len(layout.host_of))]
        draw_links(links, names, bits=several, title="From rank to rank", path=path)
    else:
        draw_links(measured.between.hosts_gb_per_s, layout.names, bits=True, title="From host to host", path=path)


@contextlib.contextmanager
def _writing(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"doctor: {folder} can't be written: {error.strerror}. Choose another ({key}).") from error
