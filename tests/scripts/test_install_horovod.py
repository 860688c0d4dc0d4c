"""`scripts/install_horovod.sh` with a stand-in for Python, which builds an empty wheel and says how it was asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_horovod.sh"
TOOLS = ("bash", "cat", "cp", "dirname", "find", "mkdir", "mktemp", "mv", "nproc", "rm", "sleep", "tail", "touch")
BUILD = "horovod-0.28.1-torch-2.13.0+cpu-cp311-linux-x86_64-gloo"
PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")/.." && pwd)
if [[ $1 == - ]]; then
    cat > /dev/null
    installed=none
    [[ ! -f $here/horovod ]] || installed=0.28.1
    echo "cp311-linux-x86_64 ${TORCH:-2.13.0+cpu} $installed $here"
    exit
fi
echo "$* MPI=${HOROVOD_WITH_MPI:-no}" >> "$here/calls"
case "$3" in
    wheel)
        [[ -z ${BROKEN:-} ]] || { echo "error: it is broken" >&2; exit 1; }
        sleep "${BUILD_S:-0}"
        while [[ $1 != --wheel-dir ]]; do shift; done
        mkdir -p "$2" && touch "$2/horovod-0.28.1-cp311-cp311-linux_x86_64.whl" ;;
    install) touch "$here/horovod" ;;
esac
"""


class Machine:
    """A folder with a few programs, a cache and environments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs, self.cache = folder, folder / "programs", folder / "cache"
        self.programs.mkdir()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(str(shutil.which(tool)))
        for tool in ("c++", "make", "cmake"):
            self.give(tool)

    def give(self, tool: str) -> None:
        """A program that does nothing."""
        (self.programs / tool).write_text("#!/usr/bin/env bash\n")
        (self.programs / tool).chmod(0o755)

    def environment(self, name: str) -> Path:
        """Its Python."""
        python = self.folder / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        return python

    def start(self, python: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
        given = {"PATH": str(self.programs), "SHARDWRIGHT_WHEELS": str(self.cache), **variables}
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--python", str(python), *words],
            env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, python: Path, *words: str, **variables: str) -> tuple[int, str, str]:
        with self.start(python, *words, **variables) as started:
            out, err = started.communicate(timeout=30)
        return started.returncode, out, err

    def built(self) -> list[str]:
        """What lies in the cache."""
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def calls(python: Path) -> list[str]:
    """Which of pip's commands it was asked for."""
    words = [line.split() for line in (python.parents[1] / "calls").read_text().splitlines()]
    return [line[2] for line in words if line[:2] == ["-m", "pip"]]


def test_wheel_is_built_once_for_all_environments_with_the_same_torch(machine: Machine) -> None:
    one, other, newer = (machine.environment(name) for name in ("one", "other place", "newer"))
    code, out, err = machine.run(one)
    assert (code, err) == (0, "")
    assert f"building {BUILD}" in out
    assert machine.run(one) == (0, f"install_horovod: {BUILD} is installed\n", "")
    assert machine.run(other) == (0, f"install_horovod: installed {BUILD}\n", "")
    assert machine.run(newer, TORCH="2.14.0")[0] == 0
    assert [calls(python) for python in (one, other, newer)] == [
        ["wheel", "install"],
        ["install"],
        ["wheel", "install"],
    ]
    assert len(machine.built()) == 2


def test_options_make_another_wheel(machine: Machine) -> None:
    python = machine.environment("one")
    machine.give("mpicxx")
    assert machine.run(python)[0] == machine.run(python, "--mpi")[0] == 0
    assert [line.rpartition("MPI=")[2] for line in (python.parents[1] / "calls").read_text().splitlines()
            if "pip wheel" in line] == ["no", "1"]  # fmt: skip
    assert {path.partition("/")[0] for path in machine.built()} == {BUILD, f"{BUILD}-mpi"}
    assert machine.run(python, "--rebuild")[0] == 0
    assert calls(python)[-2:] == ["wheel", "install"]


@pytest.mark.parametrize(
    ("missing", "words", "said"),
    [
        ("c++", (), "there is no C++ compiler"),
        ("make", (), "neither make nor ninja"),
        ("", ("--mpi",), "--mpi needs mpicxx"),
        ("", ("--nccl",), "--nccl needs the CUDA toolkit"),
        ("", ("--mpj",), "there is no option '--mpj'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(machine: Machine, missing: str, words: tuple[str, ...], said: str) -> None:
    if missing:
        (machine.programs / missing).unlink()
    code, _, err = machine.run(machine.environment("one"), *words)
    assert code == 1
    *before, last = err.splitlines()
    assert last.startswith("ERROR: install_horovod: ")
    assert said in last
    assert not before or "--mpj" in words
    assert not list(machine.cache.glob("building.*"))


def test_missing_python_or_torch_is_said_in_one_line(machine: Machine) -> None:
    assert "there is no Python at" in machine.run(machine.folder / "nowhere")[2]
    assert "has no torch" in machine.run(machine.environment("one"), TORCH="none")[2]


def test_failed_build_shows_its_end_and_keeps_its_log(machine: Machine) -> None:
    code, _, err = machine.run(machine.environment("one"), BROKEN="yes")
    assert code == 1
    why = f"the build failed; all that it said is in {machine.cache}/{BUILD}.log"
    assert err == f"error: it is broken\nERROR: install_horovod: {why}\n"
    assert machine.built() == [f"{BUILD}.log"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_build_leaves_nothing_that_the_next_waits_for(machine: Machine, number: signal.Signals) -> None:
    python = machine.environment("one")
    with machine.start(python, BUILD_S="60") as started:
        deadline = time.monotonic() + 20
        while not (python.parents[1] / "calls").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (started if number == signal.SIGTERM else Group(started.pid)).send_signal(number)
        assert started.wait(20) == (130 if number == signal.SIGTERM else -number)
        if number == signal.SIGTERM:
            os.killpg(started.pid, signal.SIGKILL)  # the stand-in's sleep
    assert bool(list(machine.cache.glob("building.*"))) == (number == signal.SIGKILL)
    begin = time.monotonic()
    assert machine.run(python)[0] == 0
    assert time.monotonic() - begin < 20


class Group:
    """A process and all that it started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def send_signal(self, number: signal.Signals) -> None:
        """To all of them."""
        os.killpg(self.number, number)
