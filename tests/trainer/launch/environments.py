"""Python environments with packages that the project's own must not hold, made once and kept in the system's folder
for temporary files; for tests behind SHARDWRIGHT_CLUSTER=all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NEEDS = pytest.mark.skipif(
    os.environ.get("SHARDWRIGHT_CLUSTER") != "all",
    reason="installs packages that aren't in the lock: set SHARDWRIGHT_CLUSTER=all",
)


def environment(packages: tuple[str, ...], alone: tuple[str, ...] = (), *, with_ours: bool = False) -> Path:
    """The interpreter of an environment.

    Args:
        packages: for pip.
        alone: the same, but without what they ask for.
        with_ours: the packages of the running interpreter are there too.
    """
    digest = hashlib.sha256(repr((sys.prefix, packages, alone, with_ours)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"shardwright-environment-{digest}"
    folder.mkdir(exist_ok=True)
    python, done = folder / "venv" / "bin" / "python", folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *packages], check=True, stderr=subprocess.DEVNULL)
            if alone:
                subprocess.run([*pip, "--no-deps", *alone], check=True, stderr=subprocess.DEVNULL)
            if with_ours:
                [site] = (folder / "venv" / "lib").glob("python*/site-packages")
                (site / "ours.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path) + "\n")
            done.touch()
    return python
