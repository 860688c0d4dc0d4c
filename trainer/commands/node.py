"""Start the processes of one machine of a job: in pods of Kubernetes and containers of AWS Batch, and by hand."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.commands import Parser
from trainer.stop import EXIT_STOPPED, SignalEars

_PORT = 29500
_ALONE = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which machine of a job this is."""

    machine: int
    """0 is the one where all meet."""
    machines: int
    address: str
    """Of machine 0."""
    port: int


def parser() -> Parser:
    """`shardwright node`'s own options."""
    found = Parser(
        "node",
        "Start the processes of a training job on this machine, which is one of several of the job: each starts the "
        "same command. Which one it is, and where the first is, comes from the variables of Kubernetes' operators "
        "(PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, or MASTER_ADDR, RANK and WORLD_SIZE counting "
        "pods) or of AWS Batch; without them the machine is alone. No ssh. Everything else on the command line goes to "
        "the training script. A SIGTERM is passed on, and checkpoints are waited for; exit codes are those of "
        "`shardwright launch`.",
        rest=True,
    )
    found.add_argument("--processes", type=int, metavar="N", help="of this machine; default: GPUs, or 2")
    found.add_argument("--script", type=Path, help="one of your own that calls trainer.run, or our doctor.py")
    return found


def main(options: Namespace) -> int:
    """Answers with the exit code of the first process that failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a name that isn't known yet is no news
    from strategies.errors import ConfigError
    from trainer.launch.agent import Meeting
    from trainer.launch.containers import OURS_BY_NAME
    from trainer.launch.local import LocalLauncher, launch_local
    from trainer.launch.local_job import SCRIPTS

    here = place_of(os.environ)
    processes = LocalLauncher(processes=options.processes).num_processes()
    script: Path = options.script or SCRIPTS / OURS_BY_NAME[0]
    if str(script) in OURS_BY_NAME and not script.is_file():
        script = SCRIPTS / script
    if not script.is_file():
        raise ConfigError(f"launch: there is no script {script}. Name a file (--script).")
    meeting = None
    if here.machines > 1:
        # As a container's first process it would be deaf to a SIGTERM while it waits for the others.
        ears = SignalEars(lambda number: None, lambda number: os._exit(EXIT_STOPPED))
        ears.listen((signal.SIGINT, signal.SIGTERM))
        try:
            meeting = Meeting.among([here.address] * here.machines, here.machine, here.port)
        finally:
            ears.close()
    return launch_local(script, options.rest, processes, 0, meeting)


def place_of(variables: Mapping[str, str]) -> Place:
    """What the variables say.

    Raises:
        ConfigError: one is missing, or isn't what it should be.
    """
    from strategies.errors import ConfigError
    from strategies.launchers import number_in, started

    if "AWS_BATCH_JOB_NUM_NODES" in variables:
        batch = started({name: value for name, value in variables.items() if name.startswith("AWS_BATCH_")})
        assert batch is not None
        found = Place(
            machine=batch.rank, machines=batch.size, address=batch.address or _ALONE, port=batch.port or _PORT
        )
    elif "PET_NNODES" in variables or "PET_NODE_RANK" in variables:
        found = _place(variables, "PET_NODE_RANK", "PET_NNODES", "PET_MASTER_")
    elif "MASTER_ADDR" in variables and "RANK" in variables:
        found = _place(variables, "RANK", "WORLD_SIZE", "MASTER_")
    else:
        return Place(machine=0, machines=1, address=_ALONE, port=number_in(variables, "PET_MASTER_PORT", _PORT))
    if found.machine >= found.machines:
        raise ConfigError(
            f"launch: machine {found.machine} of {found.machines} can't be. Leave the operator's variables alone "
            "(PET_NODE_RANK, PET_NNODES)."
        )
    return found


def _place(variables: Mapping[str, str], rank: str, size: str, where: str) -> Place:
    from strategies.errors import ConfigError
    from strategies.launchers import number_in

    machine, machines = number_in(variables, rank), number_in(variables, size)
    address = variables.get(f"{where}ADDR") or variables.get("MASTER_ADDR") or (_ALONE if machines == 1 else "")
    if not address:
        raise ConfigError(
            f"launch: {machines} machines, and nobody says where the first one is. Set its name or address "
            f"({where}ADDR)."
        )
    port = number_in(variables, f"{where}PORT", number_in(variables, "MASTER_PORT", _PORT))
    return Place(machine=machine, machines=machines, address=address, port=port)
