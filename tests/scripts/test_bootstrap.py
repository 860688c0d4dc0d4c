"""The set-up's own decisions, on an empty copy of a checkout; nothing is installed here."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path) -> ModuleType:
    """The script, loaded from a checkout that holds nothing but a lock and a project file."""
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / "bootstrap.py"
    copy.write_text(SCRIPT.read_text())
    (tmp_path / "requirements.lock").write_text("# head\n\nsetuptools==84.0\ntorch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("")
    spec = importlib.util.spec_from_file_location("bootstrap_copy", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path == module.ROOT
    return module


@pytest.fixture
def calls(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the set-up would run; `venv` leaves a Python behind, as the real one does."""
    seen: list[list[str]] = []

    def call(what: str, command: list[str]) -> None:
        seen.append(command)
        if what == "venv":
            bootstrap.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            bootstrap.PYTHON.touch()

    monkeypatch.setattr(bootstrap, "call", call)
    return seen


def test_set_up_fresh_checkout_makes_venv_then_installs_lock_then_project(
    bootstrap: ModuleType, calls: list[list[str]]
) -> None:
    bootstrap.set_up()
    assert [command[2] for command in calls] == ["venv", "pip", "pip", "pip", "compileall"]
    assert calls[1][-1] == "setuptools==84.0"
    assert calls[2][-2:] == ["--requirement", str(bootstrap.LOCK)]
    assert calls[3][-3:] == ["--no-deps", "--editable", str(bootstrap.ROOT)]
    assert bootstrap.is_ready()


def test_set_up_ready_environment_runs_nothing(bootstrap: ModuleType, calls: list[list[str]]) -> None:
    bootstrap.set_up()
    calls.clear()
    bootstrap.set_up()
    assert calls == []


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_set_up_changed_pins_installs_into_the_same_environment(
    bootstrap: ModuleType, calls: list[list[str]], name: str
) -> None:
    bootstrap.set_up()
    calls.clear()
    with (bootstrap.ROOT / name).open("a") as file:
        file.write("# changed\n")
    bootstrap.set_up()
    assert [command[2] for command in calls] == ["pip", "pip", "pip", "compileall"]
    assert bootstrap.is_ready()


def test_set_up_broken_off_begins_again(
    bootstrap: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = bootstrap.call

    def break_off(what: str, command: list[str]) -> None:
        if "--requirement" in command:
            raise KeyboardInterrupt
        working(what, command)

    monkeypatch.setattr(bootstrap, "call", break_off)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up()
    assert not bootstrap.is_ready()
    monkeypatch.setattr(bootstrap, "call", working)
    calls.clear()
    bootstrap.set_up()
    assert calls[0][1:4] == ["-m", "venv", "--clear"]
    assert bootstrap.is_ready()


def test_set_up_of_another_place_begins_again(bootstrap: ModuleType, calls: list[list[str]]) -> None:
    bootstrap.set_up()
    bootstrap.STAMP.write_text(f"/elsewhere/.venv /usr/bin/python3\n{bootstrap.contents()}\n")
    calls.clear()
    bootstrap.set_up()
    assert calls[0][1:4] == ["-m", "venv", "--clear"]


def test_set_up_little_room_is_refused_before_anything_is_made(
    bootstrap: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "NEEDED_BYTES", 1 << 62)
    with pytest.raises(bootstrap.SetupError, match=r"GB free at .*Make room\."):
        bootstrap.set_up()
    assert calls == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('WARNING: x\\nERROR: no such pin', file=sys.stderr); sys.exit(3)", "pip failed.*3: ERROR: no such pin"),
        ("print('OSError: [Errno 28] No space left on device', file=sys.stderr); sys.exit(1)", "the disk is full"),
    ],
)
def test_call_failing_command_ends_in_one_line(bootstrap: ModuleType, script: str, message: str) -> None:
    with pytest.raises(bootstrap.SetupError, match=message) as caught:
        bootstrap.call("pip", [sys.executable, "-c", f"import sys; {script}"])
    assert "\n" not in str(caught.value)


def test_main_old_python_exits_with_one_line(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert bootstrap.main(["train"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_main_missing_venv_module_names_it(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    assert bootstrap.main(["test"]) == 1
    assert "lacks the module 'ensurepip'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["tarin"]])
def test_main_unknown_command_exits_two(bootstrap: ModuleType, arguments: list[str]) -> None:
    assert bootstrap.main(arguments) == 2


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("5", "5")])
def test_train_threads_share_the_cores_unless_set(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    started = {}

    def execve(path: Path, command: list[str], environment: dict[str, str]) -> None:
        started.update(command=command, environment=environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(bootstrap, "num_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    bootstrap.train(["seed=1"])
    assert started["environment"]["OMP_NUM_THREADS"] == expected
    assert started["command"][-5:] == ["scripts/launch.py", "--nproc-per-node", "2", "run.dir=runs/first", "seed=1"]


@pytest.mark.parametrize(
    ("failing", "beside", "code", "said"),
    [
        ("mypy", 0, 1, "failed: mypy\n"),
        ("", 3, 3, "failed: pytest tests/faults ...\nfailed: pytest tests/trainer ...\n"),
        ("", 0, 0, ""),
    ],
)
def test_test_failing_step_runs_the_others_and_is_named(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
    beside: int,
    code: int,
    said: str,
) -> None:
    ran = []

    def run(command: list[str]) -> int:
        ran.append(command[2])
        return int(command[2] == failing)

    monkeypatch.setattr(bootstrap, "run", run)
    bootstrap.PYTHON.parent.mkdir(parents=True)
    bootstrap.PYTHON.write_text(f"#!/bin/sh\necho part: $*\nexit {beside}\n")
    bootstrap.PYTHON.chmod(0o755)
    assert bootstrap.test([]) == code
    assert ran == ["ruff", "ruff", "mypy", "pytest"]
    told = capsys.readouterr()
    assert told.err == said
    for first in ("tests/faults", "tests/trainer"):
        assert f"part: -m pytest {first}" in told.out


def test_parts_hold_every_test_once(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    found = [path for words in bootstrap.parts() for path in files if _is_taken(path, words)]
    assert sorted(found) == files


def _is_taken(path: Path, words: list[str]) -> bool:
    parents = {str(each.relative_to(ROOT)) for each in (path, *path.parents) if each.is_relative_to(ROOT)}
    taken = [word for word in words if not word.startswith("--")] or ["tests"]
    left_out = [word.removeprefix("--ignore=") for word in words if word.startswith("--")]
    return not parents.isdisjoint(taken) and parents.isdisjoint(left_out)


def test_run_termination_reaches_the_child(bootstrap: ModuleType, tmp_path: Path) -> None:
    child = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(bootstrap.ROOT / 'scripts')!r}); import bootstrap; "
        f"sys.exit(bootstrap.run([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 7


@pytest.mark.parametrize(("word", "wanted"), [("test", 1), ("train", 0)])
def test_main_builds_horovod_for_the_tests_only(
    bootstrap: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, word: str, wanted: int
) -> None:
    monkeypatch.chdir(bootstrap.ROOT)
    for name in ("train", "test"):
        monkeypatch.setattr(bootstrap, name, lambda words: 0)
    assert bootstrap.main([word]) == 0
    script = str(bootstrap.ROOT / "scripts" / "install_horovod.sh")
    assert [command for command in calls if script in command] == wanted * [
        ["bash", script, "--python", str(bootstrap.PYTHON)]
    ]
