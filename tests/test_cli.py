"""The command line as a person meets it: real processes, exit codes, one line for a mistake, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY, lines
from trainer.cli import main

DEFAULTS = ("logger=[tensorboard]", "hooks=[samples]", "hooks.samples.length=8", "trainer.eval_every=10")
"""What a plain run has, and `TINY` switches off."""


def environment() -> dict[str, str]:
    """That of a terminal, without what this test run's own launcher may have set."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@contextmanager
def started(*words: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, as a terminal starts it, writing to `folder`."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            words, stdout=out, stderr=err, cwd=folder, env=environment(), text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def num_lines(run: Path) -> int:
    return len(lines(run)) if (run / "metrics.jsonl").is_file() else 0


def starts(run: Path) -> list[int]:
    """The step from which each start went on."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "start"]


def launch(*keys: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node", "2", *keys]


# Mistakes.


def test_train_from_elsewhere_and_not_installed_says_a_mistake_in_one_line(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("conf", "scripts", "strategies", "trainer"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "conf" / "model" / "only_here.yaml").write_text("defaults:\n  - /schema@_here_: HFModel\n")
    found = subprocess.run(
        [sys.executable, str(checkout / "scripts" / "train.py"), "model=only_hear"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=90, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    [line] = found.stderr.splitlines()
    assert line.startswith("ConfigError: ")
    assert "only_here" in line  # its own conf/, not that of an installation
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_launch_mistake_is_said_once_by_two_processes(tmp_path: Path) -> None:
    with started(*launch(*TINY, "data.paths=[nowhere]", "run.dir=run"), folder=tmp_path) as process:
        assert process.wait(90) == 2
    assert (tmp_path / "out").read_text() == ""
    [line] = (tmp_path / "err").read_text().splitlines()
    assert line.startswith("ConfigError: ")
    assert "nowhere" in line
    assert "data.paths" in line


# Signals and crashes.


def test_launch_stopped_goes_on_and_survives_a_killed_worker(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = launch(*TINY, *DEFAULTS, "trainer.max_steps=1000000", "checkpoint.every=5", "run.dir=run")
    with started(*command, folder=tmp_path) as process:
        wait_for(lambda: num_lines(run) > 12, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        assert process.wait(60) == 75
    _assert_quiet(tmp_path)
    stopped_at = num_lines(run)
    assert (run / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    assert json.loads((run / "summary.json").read_text())["reason"] == "stopped by SIGINT"
    assert "the same command goes on" in (tmp_path / "out").read_text()

    command[2:2] = ["--max-restarts", "3"]
    with started(*command, folder=tmp_path) as process:
        wait_for(lambda: num_lines(run) > stopped_at + 7, process)
        worker = psutil.Process(process.pid).children()[-1]
        worker.kill()
        wait_for(lambda: len(starts(run)) == 3, process)
        wait_for(lambda: num_lines(run) > starts(run)[2] + 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert starts(run)[:2] == [0, stopped_at]
    assert starts(run)[2] > stopped_at
    assert starts(run)[2] % 5 == 0  # a checkpoint on the way, and no second restart after the end
    assert [line["step"] for line in lines(run)] == list(range(1, num_lines(run) + 1))


def _assert_quiet(folder: Path) -> None:
    """Of what a run prints, every line is ours, and nothing complains."""
    assert (folder / "err").read_text().strip(
        "\n"
    ) == "SIGINT: stopping at the next step, with a checkpoint; again: at once"
    out = (folder / "out").read_text()
    for word in ("Traceback", "Warning", "warn", "W1", "I1", "E1", "[rank", "Gloo", "c10d"):
        assert word not in out, out


def test_torchrun_told_to_end_leaves_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "scripts" / "train.py"), *TINY, "trainer.max_steps=1000000", "run.dir=run"]
    with started(*command, folder=tmp_path) as process:
        wait_for(lambda: num_lines(run) > 5, process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert (run / "checkpoints" / f"step-{num_lines(run):08d}" / "manifest.json").is_file()
    assert json.loads((run / "summary.json").read_text())["reason"] == "stopped by SIGTERM"


# The words after `shardwright`, in this process.


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize("name", ["launch", "plan", "doctor", "export", "generate", "report", "monitoring"])
def test_main_help_of_each_command_explains_it(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = called(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: shardwright {name}")


@pytest.mark.parametrize("name", ["export", "generate"])
def test_main_help_needs_no_torch(name: str) -> None:
    words = f"import sys; sys.modules['torch'] = None; from trainer.cli import main; main(['{name}', '--help'])"
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_main_help_names_every_command(capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, out, _ = called(capsys, word)
    assert code == 0
    for name in ("train", "launch", "plan", "doctor", "export", "generate", "report", "monitoring"):
        assert f"\n  {name} " in out


def test_main_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert called(capsys, "--version") == (0, f"shardwright {version('shardwright')}\n", "")


def test_main_without_a_command_is_wrong_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: shardwright COMMAND")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["exprot"], ["exprot", "Nearest: export."]),
        (["xyz"], ["xyz", "Choices: train, launch"]),
        (["export", "runs/a"], ["target", "--help"]),
        (["export", "runs/a", "b", "c"], ["c"]),
        (["generate"], ["source", "--help"]),
        (["generate", "nowhere", "a", "--top-p", "2"], ["--top-p=2.0"]),
        (["launch", "--nproc-per-node", "two"], ["--nproc-per-node", "two"]),
        (["launch", "--nproc-per-node", "0"], ["processes=0", "--nproc-per-node"]),
        (["launch", "--max-restarts", "-1"], ["max_restarts=-1", "--max-restarts"]),
        (["launch", "--script", "nowhere.py"], ["nowhere.py", "--script"]),
        (["plan", "--ranks", "0"], ["--ranks", "'0'"]),
        (["plan", "--rank", "2"], ["--rank"]),
        (["plan", "model=own"], ["model=own"]),
        (["plan", "modl=llama_tiny"], ["modl", "Nearest: model"]),
        (["report", "nowhere"], ["nowhere", "metrics.jsonl"]),
        (["doctor", "now"], ["now"]),
    ],
)
def test_main_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]) -> None:
    code, out, err = called(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("ConfigError: ")
    for part in parts:
        assert part in err
