"""Which machine of a job this is, by the variables of those who start containers, and where all meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from strategies.errors import ConfigError
from strategies.launchers import started
from tests.trainer.commands.jobs import ROOT
from trainer.commands import COMMANDS
from trainer.commands.node import Place, place_of
from trainer.launch.agent import Meeting

PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"}
BATCH = {"AWS_BATCH_JOB_NUM_NODES": "3", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0"}
ADDRESS = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"


def place(machine: int, machines: int, address: str = "127.0.0.1", port: int = 29500) -> Place:
    return Place(machine=machine, machines=machines, address=address, port=port)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, place(0, 1)),
        (PET, place(1, 2, "job-master-0", 23456)),
        # WORLD_SIZE counts processes in newer operators, pods in older ones, which set no PET_ variables.
        ({**PET, "RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "other", "MASTER_PORT": "1"},
         place(1, 2, "job-master-0", 23456)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
         place(1, 2, "job-master-0", 23456)),
        ({"PET_NNODES": "1", "PET_NODE_RANK": "0"}, place(0, 1)),
        ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "0"}, place(0, 3)),
        ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "2", ADDRESS: "10.0.0.5"}, place(2, 3, "10.0.0.5")),
        ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "0", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "1", ADDRESS: "10.0.0.5"},
         place(1, 3, "10.0.0.5")),
        ({"AWS_BATCH_JOB_ID": "x", "AWS_BATCH_JOB_ATTEMPT": "2"}, place(0, 1)),
    ],
)  # fmt: skip
def test_place_is_what_the_variables_say(variables: dict[str, str], expected: Place) -> None:
    assert place_of(variables) == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PET_NNODES": "2"}, "PET_NODE_RANK=None is not a number"),
        ({**PET, "PET_NODE_RANK": "2"}, "machine 2 of 2 can't be"),
        ({**PET, "PET_NNODES": "1:4"}, "PET_NNODES='1:4' is not a number"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_MASTER_ADDR"),
        ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "1"}, ADDRESS),
        ({"RANK": "1", "MASTER_ADDR": "x"}, "WORLD_SIZE"),
    ],
)
def test_place_that_cannot_be_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        place_of(variables)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_process_of_a_pod_has_its_first_device() -> None:
    """Started without any launcher, where the operator numbers pods."""
    numbers = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    found = started({**numbers, **PET})
    assert found is not None
    assert (found.rank, found.size, found.local_rank) == (1, 2, 0)
    by_hand = started(numbers)
    assert by_hand is not None
    assert by_hand.local_rank == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--processes", "0"], "processes=0 is below 1"), (["--script", "nowhere.py"], "there is no script nowhere.py")],
)
def test_wrong_option_is_refused(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PET, "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with pytest.raises(ConfigError, match=said):
        COMMANDS["node"].run(COMMANDS["node"].parse(words))


def test_machine_that_waits_for_the_others_hears_a_signal(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "MASTER_ADDR")}
    variables |= PET | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    ready = tmp_path / "ready"
    program = (  # what it calls next blocks in C++
        "import pathlib, sys, trainer.launch.agent as agent\n"
        "among = agent.Meeting.among\n"
        f"agent.Meeting.among = lambda *given: (pathlib.Path({str(ready)!r}).touch(), among(*given))\n"
        "from trainer.cli import main\nmain(['node', '--processes', '1'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=variables, stderr=subprocess.DEVNULL) as process:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        assert process.wait(30) == 75


def test_machine_that_is_started_again_waits_until_the_others_are_too(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    addresses = ["127.0.0.1", "127.0.0.1"]
    first = Meeting.among(addresses, 0, port)
    left = Meeting.among(addresses, 1, port)
    del left  # its container ended, and a new one begins
    again: list[Meeting] = []
    waiting = threading.Thread(target=lambda: again.append(Meeting.among(addresses, 1, port)))
    waiting.start()
    waiting.join(1.2)
    assert waiting.is_alive(), "it would meet what is about to end"
    del first
    second = Meeting.among(addresses, 0, port)
    waiting.join(30)
    assert not waiting.is_alive()
    second.next_rendezvous().store.set("key", "value")
    assert again[0].next_rendezvous().store.get("key") == b"value"
