"""Train or test on a machine that has only Python: make `.venv` from the lock, then run in it.

    python3 scripts/bootstrap.py train [key=value ...]
    python3 scripts/bootstrap.py test [pytest arguments ...]

Uses the standard library alone, in a syntax that older Pythons can parse far enough to be refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
CACHE = ROOT / ".cache"
STAMP = VENV / "shardwright-stamp"  # written last: what this environment was made from
UNFINISHED = CACHE / "bootstrap.unfinished"  # there while a set-up runs, and after one that broke off
NEEDED_BYTES = 3 * 1024**3  # the CPU build's environment, and pip's temporary files
PROCESSES = 2


class SetupError(Exception):
    """The environment can't be made; the message is one line."""


def main(arguments: list[str]) -> int:
    """Set up if need be, then train (replaces this process) or test."""
    if not arguments or arguments[0] not in ("train", "test"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        check_machine()
        set_up()
        if arguments[0] == "test":
            say("Horovod for this torch (its first build takes minutes)")
            call("Horovod", ["bash", str(ROOT / "scripts" / "install_horovod.sh"), "--python", str(PYTHON)])
    except SetupError as error:
        print(f"SetupError: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("SetupError: interrupted; the next start begins the set-up again.", file=sys.stderr)
        return 130
    os.chdir(ROOT)
    return train(arguments[1:]) if arguments[0] == "train" else test(arguments[1:])


def check_machine() -> None:
    """Refuse a Python that can't make the environment."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an old Python is given
        newer = next(
            (path for path in map(shutil.which, ("python3.14", "python3.13", "python3.12", "python3.11")) if path), None
        )
        advice = f"Start this with {newer}." if newer else "Install Python 3.11 or newer."
        raise SetupError(f"Python {sys.version.split()[0]} is too old. {advice}")
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} lacks the module {missing[0]!r}. Install it (Debian, Ubuntu: apt install "
            f"python3.{sys.version_info[1]}-venv), or start this with another Python."
        )


def place() -> str:
    """Where the environment lies and on which Python: it survives neither a move nor another Python."""
    return f"{VENV} {PYTHON.resolve()}"


def contents() -> str:
    """What the environment is to hold."""
    return hashlib.sha256(LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()


def stamped() -> list[str]:
    """The place and the contents that the last whole set-up wrote down; empty if there was none."""
    if UNFINISHED.exists() or not PYTHON.exists() or not STAMP.is_file():
        return []
    return STAMP.read_text().splitlines()


def is_ready() -> bool:
    """Whether `.venv` is whole and made from the present lock."""
    return stamped() == [place(), contents()]


def set_up() -> None:
    """Make `.venv` unless it is ready; one process at a time, the others wait."""
    if is_ready():
        return
    import fcntl

    CACHE.mkdir(exist_ok=True)
    with (CACHE / "bootstrap.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ready():  # the one before may have done it
            install()


def install() -> None:
    """Make the environment and install the lock, then the project itself, editable."""
    start = time.monotonic()
    moved = stamped() and stamped()[0] != place()
    begin_again = moved or UNFINISHED.exists() or not PYTHON.exists()
    if begin_again and (free := shutil.disk_usage(ROOT).free) < NEEDED_BYTES:
        raise SetupError(f"{free / 1e9:.1f} GB free at {ROOT}, {NEEDED_BYTES / 1e9:.1f} GB are needed. Make room.")
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    if begin_again:
        say(f"1/3 making .venv with Python {sys.version.split()[0]}")
        call("venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    pins = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    # Builds run in this environment, with the lock's setuptools: an isolated one would fetch its own.
    builders = [pin for pin in pins if pin.split("==")[0] in ("setuptools", "wheel")]
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-user", "--no-build-isolation"]
    say(f"2/3 installing {len(pins)} packages (some minutes without pip's cache)")
    call("pip", [*pip, "--quiet", *builders])
    call("pip", [*pip, "--requirement", str(LOCK)])
    say("3/3 installing the project")
    call("pip", [*pip, "--quiet", "--no-deps", "--editable", str(ROOT)])
    call("compileall", [str(PYTHON), "-m", "compileall", "-q", "trainer", "strategies", "tests"])  # pip does the others
    STAMP.write_text(f"{place()}\n{contents()}\n")
    UNFINISHED.unlink()
    say(f"ready after {time.monotonic() - start:.0f} s")


def call(what: str, command: list[str]) -> None:
    """Run one command of the set-up; its errors are shown, and end in one line."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        seen = []
        for line in child.stderr or ():
            sys.stderr.write(line)
            seen.append(line)
    if child.returncode == 0:
        return
    if any("No space left on device" in line for line in seen):
        raise SetupError(f"the disk is full ({what} failed at {ROOT}). Make room and start again.")
    reason = next((line.strip() for line in reversed(seen) if line.startswith("ERROR")), "see the lines above")
    raise SetupError(f"{what} failed with exit code {child.returncode}: {reason}. Mend it and start again.")


def train(overrides: list[str]) -> int:
    """Become torchrun's machinery with the training script on `PROCESSES` processes."""
    environment = {"OMP_NUM_THREADS": str(max(1, num_cores() // PROCESSES)), **os.environ}
    launcher = [str(PYTHON), "scripts/launch.py", "--nproc-per-node", str(PROCESSES)]
    sys.stdout.flush()
    os.execve(PYTHON, [*launcher, "run.dir=runs/first", *overrides], environment)


def test(arguments: list[str]) -> int:
    """Run what `make check` runs; with arguments, pytest alone. Says at the end what failed."""
    if arguments:
        return checked({"pytest": ["pytest", *arguments]})
    *others, rest = parts()
    beside = []
    with contextlib.ExitStack() as stack:
        for words in others:
            say(f"pytest {' '.join(words)} (shown when all is done)")
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [str(PYTHON), "-m", "pytest", *words, "-p", "no:cacheprovider"]
            child = stack.enter_context(subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT))
            beside.append((words, child, said))
        steps = {"ruff": ["check", "."], "ruff format": ["format", "--check", "."], "mypy": [], "pytest": rest}
        code = checked({name: [name.split()[0], *words] for name, words in steps.items()})
        for words, child, said in beside:
            if code >= 128:  # ended by a signal, which this one may not have heard
                child.terminate()
            child_code = ended(child)
            said.seek(0)
            say(f"pytest {' '.join(words)}")
            print(said.read(), flush=True)
            if child_code:
                print(f"failed: pytest {words[0]} ...", file=sys.stderr)
            code = code or child_code
    return code


def parts() -> list[list[str]]:
    """pytest's arguments for three processes, which take about as long; together every test, once."""
    ours = ["tests/trainer/" + name for name in ("checkpoint", "commands", "data", "launch", "models", "sagemaker")]
    folders, files = (sorted(map(str, Path("tests").glob(pattern))) for pattern in ("[!_]*/", "test_*.py"))
    first = ["tests/faults", "tests/moves", "tests/scripts", *ours]
    third = ["tests/trainer/planner", *(path for path in folders if path not in (*first, "tests/trainer"))]
    return [first, ["tests/trainer", *files, *(f"--ignore={path}" for path in (*ours, third[0]))], third]


def checked(steps: dict[str, list[str]]) -> int:
    """Run each module of Python with its arguments; 0 if all of them are content."""
    codes = {}
    for name, words in steps.items():
        say(" ".join(words))
        codes[name] = run([str(PYTHON), "-m", *words])
    if failed := [name for name, code in codes.items() if code]:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return codes["pytest"] or (1 if failed else 0)


def run(command: list[str]) -> int:
    """A command's exit code; signals to this process reach it."""
    with subprocess.Popen(command) as child:
        return ended(child)


def ended(child: subprocess.Popen[bytes]) -> int:
    """A child's exit code, once it has ended; signals to this process reach it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: child.send_signal(got))
    while child.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # the terminal sent it to the child too
            child.wait()
    code = child.returncode
    return code if code >= 0 else 128 - code


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """A line of progress."""
    print(f"bootstrap: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
