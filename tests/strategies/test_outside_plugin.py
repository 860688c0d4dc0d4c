"""A strategy in a package of its own, and the contract run from a built wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

_STRATEGY = '''
"""A strategy that somebody else wrote."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from strategies._torch import TorchStrategy
from strategies.backends import Backend, connect_ranks
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec
from strategies.world import World
from torch import nn


@dataclass(kw_only=True)
class HandmadeStrategy(TorchStrategy):
    """Averages gradients one by one, by a hook on the last micro-batch's backward."""

    def connect(self, backend: Backend) -> World:
        self._world = connect_ranks(backend)
        return self._world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        size = 4 * model.num_parameters
        return Footprint(
            weights_bytes=size, gradients_bytes=size, moments_bytes=2 * size,
            activations_bytes=model.activation_bytes_per_sample * plan.micro_batch, buffers_bytes=0, collectives=(),
        )

    def close(self) -> None:
        self._world = self._run = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model

    def _bare(self, model: nn.Module) -> nn.Module:
        return model

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        yield
        for parameter in model.parameters() if last else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self._connected.data_size
'''

_TEST = """
import strategies
from outside_strategy import HandmadeStrategy
from strategies.testing import StrategyContract, workers


class TestHandmade(StrategyContract):
    sizes = (1, 2)

    def make(self, *, unused=False):
        return HandmadeStrategy()


def test_found_by_name_and_from_the_wheel():
    assert strategies.from_other_packages()["handmade"] is HandmadeStrategy
    assert strategies.__file__.startswith(FOLDER)


def test_chosen_by_its_word():
    from trainer.config import compose, made

    assert isinstance(made(compose(["strategy=handmade"]).strategy), HandmadeStrategy)
"""

_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "outside-strategy"
version = "1.0"

[project.entry-points."shardwright.strategies"]
handmade = "outside_strategy:HandmadeStrategy"

[tool.setuptools]
py-modules = ["outside_strategy"]
"""


def build_wheel(project: Path, folder: Path) -> Path:
    """Without the network: with the setuptools of this environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--wheel-dir", str(folder), str(project)],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds both wheels' contents, as `pip install --target` would leave it."""
    base = tmp_path_factory.mktemp("outside")
    ours = base / "ours"  # a copy: building writes beside the sources
    ours.mkdir()
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines():  # fmt: skip
        source = _ROOT / name
        if source.is_file() and not name.startswith(("tests/", "docs/", ".")):
            target = ours / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    theirs = base / "theirs"
    theirs.mkdir()
    (theirs / "pyproject.toml").write_text(_PROJECT)
    (theirs / "outside_strategy.py").write_text(_STRATEGY)
    site = base / "site"
    for project in (ours, theirs):
        with zipfile.ZipFile(build_wheel(project, base / f"{project.name}-wheel")) as wheel:
            wheel.extractall(site)
    return site


def test_contract_passes_for_an_outside_strategy_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test_handmade.py").write_text(_TEST.replace("FOLDER", repr(str(installed))))
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings =\n    error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


def test_wheel_carries_the_contract_and_no_tests(installed: Path) -> None:
    assert (installed / "strategies" / "testing.py").is_file()
    assert (installed / "strategies" / "py.typed").is_file()
    assert not (installed / "tests").exists()
