"""The folders that a job writes: space, and the speed that a checkpoint will see."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer.doctor.check import Asked, Check
from trainer.doctor.findings import Finding

_GIB, _MIB = 2**30, 2**20
_BLOCK = 4 * _MIB
_LEAST_FREE_GIB = 10.0
_SLOW_MIB_PER_S = 50.0


class DiskCheck(Check):
    """Space in the folders of the run and the cache, and how fast they take what is written for good."""

    name = "disk"
    most_bytes = 256 * _MIB
    most_s = 2.0
    """Each folder is written to for no longer, and no more, than this."""

    def look(self, asked: Asked) -> list[dict[str, Any]]:
        part = 0.25 if asked.quick else 1.0
        return [self._folder(folder, part) for folder in asked.folders]

    def _folder(self, folder: Path, part: float) -> dict[str, Any]:
        there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
        usage = shutil.disk_usage(there)
        found: dict[str, Any] = {
            "folder": str(folder),
            "total_gib": usage.total / _GIB,
            "free_gib": usage.free / _GIB,
            "mib_per_s": None,
            "error": None,
        }
        if usage.free < 2 * self.most_bytes:
            return found
        try:
            found["mib_per_s"] = self._written(there, part) / _MIB
        except OSError as error:
            found["error"] = error.strerror or type(error).__name__
        return found

    def _written(self, folder: Path, part: float) -> float:
        """Bytes per second, of data that nothing can make smaller, until the disk has them."""
        block = os.urandom(_BLOCK)
        written, begun = 0, time.perf_counter()
        with tempfile.TemporaryFile(dir=folder) as file:
            while written < part * self.most_bytes and time.perf_counter() - begun < part * self.most_s:
                file.write(block)
                file.flush()
                os.fdatasync(file.fileno())
                written += _BLOCK
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
            return written / (time.perf_counter() - begun)

    def judge(self, found: Any) -> list[Finding]:
        return [self._one(each) for each in found]

    def _one(self, found: dict[str, Any]) -> Finding:
        folder = found["folder"]
        space = f"{folder}: {found['free_gib']:,.1f} of {found['total_gib']:,.1f} GiB free"
        elsewhere = "Free space, or choose another folder (run.dir, cache)"
        if found["error"] is not None:
            return self.failure(f"{folder} can't be written: {found['error']}", elsewhere)
        if found["mib_per_s"] is None:
            return self.failure(f"{space}: too little to write a checkpoint", elsewhere)
        what = f"{space}, written at {found['mib_per_s']:,.0f} MiB/s"
        if found["free_gib"] < min(_LEAST_FREE_GIB, 0.05 * found["total_gib"]):
            return self.warning(what, elsewhere)
        if found["mib_per_s"] < _SLOW_MIB_PER_S:
            return self.warning(what, "Checkpoints will take long: choose a local disk or a faster volume (run.dir)")
        return self.ok(what)
