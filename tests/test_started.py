"""One script under every launcher's variables: the same ranks, the same losses."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.starts import Start, start
from tests.strategies.test_launchers import BROKEN
from tests.trainer.jobs import ROWS, losses

JOB = str(random.Random(os.getpid()).randrange(1, 10**6))  # decides the port of srun's steps
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + int(JOB) % 10000)}
LAUNCHERS: dict[str, dict[str, str]] = {
    "srun": {
        "SLURM_JOB_ID": JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "{RANK}", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "{RANK}", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    },
    "mpirun (MPICH)": {
        "PMI_RANK": "{RANK}", "PMI_SIZE": "2", "MPI_LOCALRANKID": "{RANK}", "MPI_LOCALNRANKS": "2", **MEETING,
    },
    "mpirun (Open MPI)": {
        "OMPI_COMM_WORLD_RANK": "{RANK}", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{RANK}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_SERVER_TMPDIR": "{folder}",
    },
    "AWS Batch": {
        "AWS_BATCH_JOB_NUM_NODES": "2", "AWS_BATCH_JOB_NODE_INDEX": "{RANK}", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
        "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "127.0.0.1",
    },
    "SageMaker": {"SM_HOSTS": '["localhost", "127.0.0.1"]', "SM_CURRENT_HOST": "{host}"},
    "torchrun": {name: f"{{{name}}}" for name in TORCHRUN} | {"TORCHELASTIC_RUN_ID": "none"},
}  # fmt: skip


def started_by(templates: Mapping[str, str], folder: str, words: list[str]) -> Start:
    """A start in this worker, which knows of its ranks only what a launcher says."""
    own = {name: os.environ[name] for name in TORCHRUN}
    host = ("localhost", "127.0.0.1")[int(own["RANK"])]
    for name in (*TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    for name, template in templates.items():
        os.environ[name] = template
        for key, value in {**own, "folder": folder, "host": host}.items():
            os.environ[name] = os.environ[name].replace(f"{{{key}}}", value)
    if templates.get("TORCHELASTIC_RUN_ID"):
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return start(words, (), "Rows")


@pytest.fixture(scope="module")
def alone(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("alone")
    words = [*ROWS, "trainer.max_steps=6", f"run.dir={folder}"]
    [ended] = workers.run(started_by, 1, {}, str(folder), words, timeout=60)
    assert ended.code == 0, ended.err
    assert "started by" not in ended.out
    return losses(folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_start_under_every_launcher_gives_the_same_losses(
    workers: Workers, tmp_path: Path, alone: list[float], launcher: str
) -> None:
    words = [*ROWS, "trainer.max_steps=6", f"run.dir={tmp_path / 'run'}"]
    ended = workers.run(started_by, 2, LAUNCHERS[launcher], str(tmp_path), words, timeout=60)
    assert [each.code for each in ended] == [0, 0], ended[0].err
    assert f"started by {launcher}: 2 processes" in ended[0].out
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=5e-6)


NOWHERE = {key: value for key, value in LAUNCHERS["mpirun (MPICH)"].items() if "MASTER" not in key}


@pytest.mark.parametrize(("variables", "parts"), [*BROKEN, (NOWHERE, ["nothing says where the ranks meet"])], ids=str)
def test_start_in_a_broken_environment_is_one_line_and_exit_code_2(
    workers: Workers, tmp_path: Path, variables: dict[str, str], parts: list[str]
) -> None:
    [ended] = workers.run(started_by, 1, variables, str(tmp_path), [*ROWS, f"run.dir={tmp_path / 'run'}"], timeout=60)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(part in ended.err for part in parts)
    assert not (tmp_path / "run").exists()
