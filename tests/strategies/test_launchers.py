"""What each launcher leaves in the environment, and environments that can't be right."""

from __future__ import annotations

import json

import pytest

from strategies.errors import ConfigError
from strategies.launchers import Started, started

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4"}
HOROVODRUN = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
OPEN_MPI = {name.replace("HOROVOD", "OMPI_COMM_WORLD"): value for name, value in HOROVODRUN.items()}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
BATCH = {
    "AWS_BATCH_JOB_NUM_NODES": "4", "AWS_BATCH_JOB_NODE_INDEX": "3", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "0",
    "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.9",
}  # fmt: skip
SAGEMAKER = {"SM_HOSTS": json.dumps([f"algo-{number}" for number in range(1, 5)]), "SM_CURRENT_HOST": "algo-4"}


def says(by: str, local: tuple[int, int | None] = (1, 2), **more: object) -> Started:
    return Started(by=by, rank=3, size=4, local_rank=local[0], local_size=local[1], **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, says("torchrun")),
        (BY_HAND, says("RANK and WORLD_SIZE", (3, None))),
        (HOROVODRUN, says("horovodrun")),
        (OPEN_MPI, says("mpirun (Open MPI)")),
        (MPICH, says("mpirun (MPICH)")),
        (SRUN, says("srun", address="gpu07", port=12219)),
        (BATCH, says("AWS Batch", (0, 1), address="10.0.0.9", port=29500)),
        (SAGEMAKER, says("SageMaker", (0, 1), address="algo-1", port=7777)),
        # One inside another: the inner one counts, the outer one knows where the machines are.
        ({**SRUN, **TORCHRUN, "SLURM_PROCID": "1"}, says("torchrun")),
        ({**SAGEMAKER, **OPEN_MPI}, says("mpirun (Open MPI)", address="algo-1", port=7777)),
        (
            {**OPEN_MPI, **SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
             "SLURM_LOCALID": "0"},
            says("mpirun (Open MPI)", address="gpu07", port=12219),
        ),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, says("mpirun (MPICH)", address="gpu07", port=12219)),
        ({**SRUN, **BY_HAND}, says("RANK and WORLD_SIZE", (3, None), address="gpu07", port=12219)),
        # What leaves no rank behind.
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
    ],
)  # fmt: skip
def test_started_reads_each_launcher(variables: dict[str, str], expected: Started | None) -> None:
    assert started(variables) == expected


@pytest.mark.parametrize(
    ("tasks", "node", "local_size"), [("2(x2)", 1, 2), ("1,3", 1, 3), ("3,1", 0, 3), ("1(x3),4", 2, 1)]
)
def test_started_counts_the_tasks_of_this_node(tasks: str, node: int, local_size: int) -> None:
    variables = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert started(variables) == says("srun", (0, local_size), address="gpu07", port=12219)


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-2]", "n1"), ("a-[3,7-9],b", "a-3"), ("b,a-[3]", "b"), ("x[007]", "x007")]
)
def test_started_finds_the_first_node(nodes: str, first: str) -> None:
    found = started({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == first


def test_started_by_batch_counts_the_main_node_as_rank_0() -> None:
    ranks = {}
    for index in range(4):
        variables = {**BATCH, "AWS_BATCH_JOB_NODE_INDEX": str(index), "AWS_BATCH_JOB_MAIN_NODE_INDEX": "2"}
        found = started(variables)
        assert found is not None
        ranks[index] = found.rank
    assert ranks == {2: 0, 0: 1, 1: 2, 3: 3}


BROKEN: list[tuple[dict[str, str], list[str]]] = [
    # Two launchers that don't mean the same ranks.
    ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "4"}, ["rank 0 of 4", "mpirun (Open MPI) says rank 3 of 4", "RANK"]),
    ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, ["rank 0 of 1", "OMPI_COMM_WORLD_RANK"]),
    ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, ["rank 0 of 1", "srun says rank 3 of 4"]),
    ({**OPEN_MPI, **HOROVODRUN, "HOROVOD_RANK": "2"}, ["horovodrun says rank 2", "rank 3 of 4"]),
    ({**HOROVODRUN, **MPICH, "PMI_SIZE": "8"}, ["horovodrun says rank 3 of 4", "rank 3 of 8"]),
    ({**SRUN, **MPICH, "PMI_RANK": "1"}, ["mpirun (MPICH) says rank 1", "srun says rank 3"]),
    # Half of what is needed, and what isn't a number.
    ({"RANK": "1"}, ["WORLD_SIZE=None"]),
    ({"WORLD_SIZE": "2"}, ["RANK=None"]),
    ({"RANK": "1", "WORLD_SIZE": "zwei"}, ["WORLD_SIZE='zwei'"]),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK='-1'"]),
    ({"RANK": "\u0663", "WORLD_SIZE": "4"}, ["RANK="]),
    ({**TORCHRUN, "LOCAL_RANK": ""}, ["LOCAL_RANK=''"]),
    ({**SRUN, "SLURM_STEP_NUM_TASKS": ""}, ["SLURM_STEP_NUM_TASKS=''"]),
    ({"OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_COMM_WORLD_SIZE=None"]),
    # Numbers that don't fit together.
    ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK=4 is not below WORLD_SIZE=4"]),
    ({**TORCHRUN, "LOCAL_RANK": "2"}, ["rank 2 of 2 on this machine", "LOCAL_RANK"]),
    ({**HOROVODRUN, "HOROVOD_LOCAL_SIZE": "8"}, ["rank 1 of 8 on this machine, and 4 ranks in all"]),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE='two'", "2(x3),1"]),
    ({**SRUN, "SLURM_STEP_NODELIST": "[1-2]"}, ["SLURM_STEP_NODELIST='[1-2]'"]),
    # Services.
    ({**SAGEMAKER, "SM_HOSTS": "algo-1"}, ["SM_HOSTS='algo-1'", "no list"]),
    ({**SAGEMAKER, "SM_HOSTS": "[]"}, ["SM_HOSTS='[]'"]),
    ({**SAGEMAKER, "SM_CURRENT_HOST": "algo-9"}, ["SM_CURRENT_HOST='algo-9'"]),
    ({"SM_HOSTS": '["algo-1"]'}, ["SM_CURRENT_HOST=None"]),
    ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "4"}, ["AWS_BATCH_JOB_NUM_NODES=4"]),
    ({**BATCH, "AWS_BATCH_JOB_NODE_INDEX": "x"}, ["AWS_BATCH_JOB_NODE_INDEX='x'"]),
    (
        {key: value for key, value in BATCH.items() if "ADDRESS" not in key},
        ["AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"],
    ),
]


@pytest.mark.parametrize(("variables", "parts"), BROKEN, ids=str)
def test_started_refuses_what_contradicts_itself(variables: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        started(variables)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
