"""How this process was started: the variables that launchers leave, one row for each launcher."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from strategies.errors import ConfigError

Environment = Mapping[str, str]

OPEN_MPI = "mpirun (Open MPI)"
_LONGEST_HOST = 255


@dataclass(frozen=True, kw_only=True)
class Started:
    """What one launcher says about this process."""

    by: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    """None: the launcher doesn't say how many ranks this machine has."""
    address: str | None = None
    """Where rank 0 is, as far as a launcher tells."""
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One launcher, and where it says the four numbers: a variable's name, or how to reckon from several."""

    by: str
    sign: str
    """Set in every process that it started, and in no other."""
    rank: str | Callable[[Environment], int]
    size: str | Callable[[Environment], int]
    local_rank: str | Callable[[Environment], int] = lambda variables: 0
    local_size: str | Callable[[Environment], int] = lambda variables: 1
    address: Callable[[Environment], str | None] = lambda variables: None
    port: Callable[[Environment], int | None] = lambda variables: None


def started(variables: Environment = os.environ) -> Started | None:
    """What the innermost launcher says; None: the process is alone.

    Raises:
        ConfigError: two launchers contradict each other, or a variable is missing or isn't what it should be.
    """
    rows = [row for row in _TABLE if row.sign in variables]
    if not rows:
        if "WORLD_SIZE" in variables:  # half of what is set by hand
            number_in(variables, "RANK")
        return None
    found, *others = (_read(row, variables) for row in (rows[:1] if rows[0] is _TORCHRUN else rows))
    for other in others:
        _refuse_contradiction(found, other)
    told = next((each for each in (found, *others) if each.address is not None), found)
    return replace(found, address=told.address, port=told.port)


def _read(row: _Row, variables: Environment) -> Started:
    rank, size = (_take(source, variables) for source in (row.rank, row.size))
    if rank >= size:
        which, of = (source if isinstance(source, str) else row.by for source in (row.rank, row.size))
        raise ConfigError(
            f"Launch: {which}={rank} is not below {of}={size}. "
            "Start every process of the run with the same number of ranks; a launcher such as torchrun sets both."
        )
    local_rank = _take(row.local_rank, variables, rank)
    local_size = _take(row.local_size, variables, 0) or None
    if local_size is not None and not local_rank < local_size <= size:
        names = ", ".join(source for source in (row.local_rank, row.local_size) if isinstance(source, str))
        raise ConfigError(
            f"Launch: {row.by} says rank {local_rank} of {local_size} on this machine, and {size} ranks in all. "
            f"Unset what was set by hand ({names or row.sign})."
        )
    return Started(
        by=row.by,
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=row.address(variables),
        port=row.port(variables),
    )


def _refuse_contradiction(found: Started, other: Started) -> None:
    """One that starts a single process per machine may have started the other launcher there."""
    if (found.rank, found.size) != (other.rank, other.size) and other.size > 1 and other.local_size != 1:
        raise ConfigError(
            f"Launch: {found.by} says rank {found.rank} of {found.size}, {other.by} says rank {other.rank} of "
            f"{other.size}. Start with one of them, and unset what the other one left ({_left(other.by)})."
        )


def _left(by: str) -> str:
    row = next(row for row in _TABLE if row.by == by)
    names = [row.sign, *(name for name in (row.rank, row.size) if isinstance(name, str))]
    return ", ".join(dict.fromkeys(names))


def _take(source: str | Callable[[Environment], int], variables: Environment, default: int | None = None) -> int:
    return number_in(variables, source, default) if isinstance(source, str) else source(variables)


def number_in(variables: Environment, name: str, default: int | None = None) -> int:
    """The number that a variable holds.

    Raises:
        ConfigError: it holds something else, or is missing and there is no default.
    """
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise ConfigError(
            f"Launch: environment variable {name}={text!r} is not a number. "
            f"Start the run with a launcher that sets it, such as torchrun, or unset all that are left over ({name})."
        )
    return int(text)


def _local_rank_by_hand(variables: Environment) -> int:
    """Kubeflow's operators number pods, and a process that nobody else started has its pod for itself."""
    return number_in(variables, "LOCAL_RANK", 0 if "PET_NODE_RANK" in variables else number_in(variables, "RANK"))


# Slurm's srun.


def _tasks_here(variables: Environment) -> int:
    """From `2(x3),1`: two tasks on each of three nodes, and one on the fourth."""
    text = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    if text is None:
        return 0
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise ConfigError(
                f"Launch: SLURM_STEP_TASKS_PER_NODE={text!r} is not what srun writes, such as 2(x3),1. "
                "Start with srun, and leave its variables alone (SLURM_STEP_TASKS_PER_NODE)."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = number_in(variables, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 0


def _local_task(variables: Environment, otherwise: str) -> int:
    return number_in(variables, "SLURM_LOCALID", number_in(variables, otherwise))


def _first_node(variables: Environment) -> str | None:
    """Of `gpu[07-09,12],other`: gpu07, where rank 0 is."""
    text = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST")
    if not text:
        return None
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", text)
    if match is None:
        raise ConfigError(
            f"Launch: SLURM_STEP_NODELIST={text[:_LONGEST_HOST]!r} names no node. "
            "Start with srun, and leave its variables alone (SLURM_STEP_NODELIST)."
        )
    return match[1] + (match[2] or "")


def _port_of_step(variables: Environment) -> int | None:
    """The same in all tasks of a step, another for the next one; below the ports that systems hand out."""
    return 12000 + (31 * number_in(variables, "SLURM_JOB_ID", 0) + number_in(variables, "SLURM_STEP_ID", 0)) % 20000


# SageMaker without a launcher: one process per host.


def _hosts(variables: Environment) -> list[str]:
    import json

    try:
        hosts = json.loads(variables["SM_HOSTS"])
        if isinstance(hosts, list) and hosts and all(isinstance(host, str) for host in hosts):
            return hosts
    except ValueError:
        pass
    raise ConfigError(
        f"Launch: SM_HOSTS={variables['SM_HOSTS'][:_LONGEST_HOST]!r} is no list of hosts, such as "
        '["algo-1", "algo-2"]. Leave SageMaker\'s variables alone (SM_HOSTS).'
    )


def _rank_of_host(variables: Environment) -> int:
    hosts, mine = _hosts(variables), variables.get("SM_CURRENT_HOST")
    if mine not in hosts:
        raise ConfigError(
            f"Launch: SM_CURRENT_HOST={mine!r} is not among SM_HOSTS={hosts}. "
            "Leave SageMaker's variables alone (SM_CURRENT_HOST)."
        )
    return hosts.index(mine)


# AWS Batch with several nodes: one process per node.


def _main_node(variables: Environment) -> str | None:
    """Only the other nodes are told where the main one is."""
    return variables.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS") or "127.0.0.1"


def _batch_rank(variables: Environment) -> int:
    """Its main node is rank 0, whichever that is."""
    mine = number_in(variables, "AWS_BATCH_JOB_NODE_INDEX")
    main = number_in(variables, "AWS_BATCH_JOB_MAIN_NODE_INDEX", 0)
    if mine != main and "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS" not in variables:
        raise ConfigError(
            f"Launch: node {mine} of an AWS Batch job isn't told where its main node {main} is. Leave Batch's "
            "variables alone (AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS)."
        )
    return 0 if mine == main else mine + (mine < main)


_TORCHRUN = _Row(
    by="torchrun",
    sign="TORCHELASTIC_RUN_ID",
    rank="RANK",
    size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
)

_TABLE: tuple[_Row, ...] = (
    # The first of them that has left its sign is the innermost one.
    _TORCHRUN,
    replace(_TORCHRUN, by="RANK and WORLD_SIZE", sign="RANK", local_rank=_local_rank_by_hand),
    _Row(
        by="horovodrun",
        sign="HOROVOD_RANK",
        rank="HOROVOD_RANK",
        size="HOROVOD_SIZE",
        local_rank="HOROVOD_LOCAL_RANK",
        local_size="HOROVOD_LOCAL_SIZE",
    ),
    _Row(
        by=OPEN_MPI,
        sign="OMPI_COMM_WORLD_RANK",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Row(
        by="mpirun (MPICH)",
        sign="PMI_RANK",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank=lambda variables: number_in(variables, "MPI_LOCALRANKID", _local_task(variables, "PMI_RANK")),
        local_size=lambda variables: number_in(variables, "MPI_LOCALNRANKS", _tasks_here(variables)),
    ),
    _Row(
        by="srun",
        sign="SLURM_STEP_NUM_TASKS",
        rank="SLURM_PROCID",
        size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size=_tasks_here,
        address=_first_node,
        port=_port_of_step,
    ),
    _Row(
        by="AWS Batch",
        sign="AWS_BATCH_JOB_NUM_NODES",
        rank=_batch_rank,
        size="AWS_BATCH_JOB_NUM_NODES",
        address=_main_node,
        port=lambda variables: 29500,
    ),
    _Row(
        by="SageMaker",
        sign="SM_HOSTS",
        rank=_rank_of_host,
        size=lambda variables: len(_hosts(variables)),
        address=lambda variables: _hosts(variables)[0],
        port=lambda variables: 7777,
    ),
)
