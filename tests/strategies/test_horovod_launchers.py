"""One script under each launcher: the same losses. And a rank that fails under one: the others hear of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.starts import start
from tests.trainer.jobs import TINY, losses

pytestmark = [
    pytest.mark.horovod,
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod isn't installed (scripts/install_horovod.sh)"),
]
ROOT = Path(__file__).parents[2]
HERE = Path(sys.executable).parent
LAUNCHERS = {
    "horovodrun": ["horovodrun", "-np", "2", sys.executable],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def launched(launcher: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program, *rest = LAUNCHERS[launcher]
    path = os.pathsep.join([str(HERE), os.environ.get("PATH", os.defpath)])
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"there is no {program} on this machine")
    return subprocess.run(
        [found, *rest, "scripts/train.py", *TINY, "strategy=horovod", "trainer.max_steps=3", *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of plain `python scripts/train.py`."""
    folder = tmp_path_factory.mktemp("alone")
    words = [*TINY, "strategy=horovod", "trainer.max_steps=3", f"run.dir={folder}"]
    [ended] = workers.run(start, 1, words, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))
    assert ended.code == 0, ended.err
    return losses(folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_same_script_gives_the_same_losses(launcher: str, alone: list[float], tmp_path: Path) -> None:
    ended = launched(launcher, tmp_path / "run", f"run.dir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=5e-6)
    assert len(alone) == 3
