"""SageMaker's own toolkit, and our entry point in its place, start the training script in a tree like /opt/ml."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.sagemaker.kit import QUICK, TEXT, Container

pytestmark = pytest.mark.timeout(300)
EVERY_TYPE = {
    "optimizer.lr": 3e-3,
    "deterministic": True,
    "trainer.ema_decay": None,
    "data.exclude": ["it's.txt", "a b.txt", 'x,"y"=z.txt'],
    "model.config.rope_parameters": {"rope_type": "default", "rope_theta": 500.5},
    "model.config.hidden_act": "silu",
}
TORCHRUN = {
    "sagemaker_torch_distributed_enabled": True,
    "sagemaker_instance_type": "ml.c5.xlarge",
    "sagemaker_mpi_num_of_processes_per_host": 2,
}


def at(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def test_toolkit_starts_the_script_and_a_second_start_by_torchrun_goes_on(tmp_path: Path) -> None:
    container = Container(base=tmp_path, channels=TEXT)
    first = container.toolkit({**QUICK, **EVERY_TYPE, "run.name": None, "sagemaker_region": "eu-west-1"})
    assert first.returncode == 0, first.stderr
    assert container.failure == ""
    config = yaml.safe_load((tmp_path / "checkpoints" / "config.yaml").read_text())
    assert {key: at(config, key) for key in EVERY_TYPE} == EVERY_TYPE
    second = container.toolkit({**QUICK, **EVERY_TYPE, **TORCHRUN, "trainer.max_steps": 6})
    assert second.returncode == 0, second.stderr
    assert "going on from" in second.stdout
    assert "NCCL_PROTO=simple" in second.stdout
    assert "started by torchrun: 2 processes" in second.stdout
    assert container.steps() == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_toolkit_shows_the_reason_of_a_script_of_ones_own(tmp_path: Path) -> None:
    container = Container(base=tmp_path, program="docs/examples/digits.py")
    good = container.toolkit({"trainer.max_epochs": 1, "trainer.hidden": 8, "logger": []})
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()
    bad = container.toolkit({"trainer.hidden": "wide"})
    assert bad.returncode != 0
    assert container.failure.startswith("ConfigError: Configuration: trainer.hidden: Value 'wide'")


def test_entry_point_passes_sigterm_on_and_the_next_start_goes_on(tmp_path: Path) -> None:
    container = Container(base=tmp_path, channels=TEXT, variables={"SHARDWRIGHT_PROCESSES": "2"})
    container.prepare({**QUICK, "trainer.max_steps": 100_000})
    words = [sys.executable, str(tmp_path / "src" / "scripts" / "container.py")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(words, env=container.environment(), stdout=said, stderr=subprocess.STDOUT)
    record = tmp_path / "checkpoints" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") > 3):
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75, (tmp_path / "said").read_text()
    reached = container.steps()[-1]
    again = container.own({**QUICK, "trainer.max_steps": reached + 2})
    assert again.returncode == 0, again.stderr
    assert f"(step {reached})" in again.stdout
    assert container.steps() == list(range(1, reached + 3))


def test_entry_point_says_that_a_process_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "src" / "own.py"
    container = Container(base=tmp_path, variables={"SHARDWRIGHT_SCRIPT": str(script)})
    container.prepare({})
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    ended = container.own({})
    assert ended.returncode == 137
    assert container.failure.startswith("TrainingError: the training script ended with exit code 137")


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("resourceconfig", '{"hosts": ["a"], "current_host": "b"}', "names the hosts ['a'] and this one as 'b'"),
        ("resourceconfig", "[]", "holds no object"),
        ("hyperparameters", "{", "can't be read"),
    ],
)
def test_entry_point_refuses_what_the_service_doesnt_write(tmp_path: Path, file: str, text: str, part: str) -> None:
    from strategies.errors import ConfigError
    from trainer.commands.container import describe_job

    container = Container(base=tmp_path)
    container.prepare({})
    (tmp_path / "input" / "config" / f"{file}.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        describe_job(tmp_path, {})
    assert part in str(caught.value)


# Two hosts, each with a disk of its own.

HOSTS = {"algo-1": "10.99.0.1", "algo-2": "10.99.0.2"}


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[str]]:
    """Two network namespaces with a cable between them; the words that run a command in each."""
    names = [f"sw-{os.getpid()}-{number}" for number in (1, 2)]
    steps: list[list[str]] = [["ip", "netns", "add", name] for name in names]
    cables = [f"v{os.getpid()}a", f"v{os.getpid()}b"]
    steps.append(["ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1]])
    for name, cable, address in zip(names, cables, HOSTS.values(), strict=True):
        inside = ["ip", "netns", "exec", name]
        steps += [
            ["ip", "link", "set", cable, "netns", name],
            [*inside, "ip", "link", "set", cable, "name", "eth0"],
            [*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0"],
            [*inside, "ip", "link", "set", "eth0", "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("needs ip netns, as root")
        for name in names:
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in HOSTS.items())]
            lines.append(f"127.0.0.1 {os.uname().nodename}")
            (folder / "hosts").write_text("\n".join(lines) + "\n")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            (Path("/etc/netns") / name / "hosts").unlink(missing_ok=True)
            if (Path("/etc/netns") / name).exists():
                (Path("/etc/netns") / name).rmdir()


@pytest.mark.parametrize("by", ["own", *(["toolkit"] if os.environ.get("SHARDWRIGHT_TOOLKIT") == "all" else [])])
def test_two_hosts_train_one_model_and_go_on_from_separate_disks(two_hosts: list[str], tmp_path: Path, by: str) -> None:
    given: dict[str, Any] = {**QUICK, "strategy": "fsdp_full"}
    if by == "toolkit":
        given |= {**TORCHRUN, "sagemaker_mpi_num_of_processes_per_host": 1}
    (tmp_path / "ml").mkdir()
    containers = [
        Container(
            base=tmp_path / host, seen_at=tmp_path / "ml", hosts=list(HOSTS), host=host, interface="eth0", network=name,
            channels=TEXT,
        )
        for host, name in zip(HOSTS, two_hosts, strict=True)
    ]  # fmt: skip
    for steps in (4, 6):
        started = [container.begin(by, {**given, "trainer.max_steps": steps}) for container in containers]
        said = [process.communicate(timeout=100)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], "\n".join(said)
        left = [bool(list((container.base / "checkpoints").rglob("*.distcp"))) for container in containers]
        assert left == [True, True]
    assert "going on from" in said[0]
    assert containers[0].steps() == [1, 2, 3, 4, 5, 6]
    assert (containers[0].base / "model" / "model.safetensors").exists()
    assert not (containers[1].base / "model" / "model.safetensors").exists()
