"""Durations and stop signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from strategies.errors import ConfigError
from trainer.stop import StopRequest, default_grace_s, seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5), (1.5, 1.5), ("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("01:30", 90),
     ("1:00:05", 3605), (None, None)],
)  # fmt: skip
def test_seconds_understands(value: object, expected: float | None) -> None:
    assert seconds(value, "trainer.max_time") == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["soon", "", 0, -5, "0s", "1:2:3:4", "5 h"])
def test_seconds_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_time"):
        seconds(value, "trainer.max_time")  # type: ignore[arg-type]


def test_request_hears_a_signal_and_gives_it_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest(None)
    request.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes on what the terminal has sent already
    assert request.signal == signal.SIGTERM
    request.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_signals_to_a_forked_child_are_its_own() -> None:
    code = (
        "import multiprocessing, os, time; from trainer.stop import StopRequest, leaving_at_once\n"
        "def end_a_child():\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start(); time.sleep(0.3); child.terminate(); child.join(); time.sleep(0.3)\n"
        "    return child.exitcode\n"
        "with leaving_at_once(os.getppid()):\n"
        "    assert end_a_child() == -15\n"
        "    request = StopRequest(None); request.listen()\n"
        "    assert end_a_child() == -15\n"
        "    assert request.signal == 0, 'the child was told, not this process'\n"
        "    request.close()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_parent_that_ends_is_no_signal_without_a_launcher() -> None:
    inner = (
        "import os, time; from trainer.stop import leaving_at_once\n"
        "with leaving_at_once(os.getppid()):\n"
        "    print('ready', flush=True); time.sleep(4); print('done', flush=True)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    shell = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" & sleep 2', sys.executable, inner],
        env={**environment, "RANK": "0"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert shell.stdout.split() == ["ready", "done"]


def test_request_second_signal_later_leaves_at_once() -> None:
    code = (
        "import os, signal, time; from trainer.stop import StopRequest; r = StopRequest(None); r.listen(); "
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(2.1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 30


def test_request_out_of_time_after_its_limit() -> None:
    assert not StopRequest(None).out_of_time()
    assert not StopRequest(60).out_of_time()
    request = StopRequest(0.01)
    time.sleep(0.02)
    assert request.out_of_time()


def test_grace_is_what_the_launcher_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHARDWRIGHT_GRACE_S", "SM_TRAINING_ENV", "TRAINING_JOB_NAME", "HOROVOD_GLOO_RENDEZVOUS_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert default_grace_s() == 30.0
    monkeypatch.setenv("TRAINING_JOB_NAME", "mine")
    assert default_grace_s() == 120.0
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "2000")
    assert default_grace_s() == 5.0
    monkeypatch.setenv("SHARDWRIGHT_GRACE_S", "7m")
    assert default_grace_s() == 420.0
