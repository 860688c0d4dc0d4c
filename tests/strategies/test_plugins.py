"""How strategies are found: in this package, and in others."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import strategies
from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.single import SingleStrategy

_ROOT = Path(__file__).parents[2]


def announce(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = [EntryPoint(name="mine", value=value, group=strategies.ENTRY_POINTS)]
    monkeypatch.setattr(strategies, "entry_points", lambda group: points if group == strategies.ENTRY_POINTS else [])


def test_built_in_strategies_are_found() -> None:
    found = strategies.built_in()
    assert {SingleStrategy, DDPStrategy} <= set(found)
    assert len(found) == len(set(found))
    assert all(issubclass(each, Strategy) and not inspect.isabstract(each) for each in found)


def test_announced_strategy_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "strategies.ddp:DDPStrategy")
    assert strategies.from_other_packages() == {"mine": DDPStrategy}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("strategies.ddp:NoSuchClass", "can't be imported"),
        ("strategies.errors:ConfigError", "is not a subclass of strategies.base.Strategy"),
        ("strategies.world:publish", "is not a subclass of strategies.base.Strategy"),
    ],
)
def test_bad_announcement_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, value: str, complaint: str) -> None:
    announce(monkeypatch, value)
    with pytest.raises(strategies.ConfigError, match=complaint) as caught:
        strategies.from_other_packages()
    assert "'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_package_needs_no_test_runner() -> None:
    code = "import strategies, sys; strategies.built_in(); print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


_START = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        sought.append(name)

def imported():  # whether one is there may also be asked by looking for it
    found = {name.partition(".")[0] for name in sought if name in sys.modules}
    return sorted(found & {"accelerate", "deepspeed", "horovod", "smdistributed"})

sought = []
sys.meta_path.insert(0, Watch())
from tests.trainer.jobs import ROWS, Rows
from trainer.cli import run

try:
    run(Rows, *ROWS, "strategy=ddp", "backend=gloo", "run.dir=" + sys.argv.pop())
except SystemExit as end:
    print("ended with", end.code, imported())
import accelerate
print("and then", imported())
"""


def test_start_of_ddp_imports_no_other_strategys_library(tmp_path: Path) -> None:
    # The model is a plain torch module: transformers imports accelerate by itself, wherever it is installed.
    done = subprocess.run(
        [sys.executable, "-c", _START, str(tmp_path / "run")],
        cwd=_ROOT, capture_output=True, text=True, check=True, timeout=170,
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["ended with 0 []", "and then ['accelerate']"], done.stdout + done.stderr


def test_every_strategy_has_all_its_settings_documented() -> None:
    for strategy in strategies.built_in():
        source = inspect.getsource(importlib.import_module(strategy.__module__))
        assert strategy.__doc__
        assert not strategy.__doc__.startswith(f"{strategy.__name__}("), f"{strategy.__name__} has no docstring"
        assert source.startswith('"""')
