"""Start the training script in several processes of this machine, with torchrun's own machinery."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from trainer.commands import Parser

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "train.py"


def parser() -> Parser:
    """`shardwright launch`'s own options."""
    found = Parser(
        "launch",
        "Train with several processes on this machine. Everything else goes to the training script, as in: "
        "shardwright launch --nproc-per-node 2 trainer.max_steps=100. The exit code is that of the first process "
        "that failed: 0 finished, 2 wrong input, 75 stopped with a checkpoint (start again to go on).",
        rest=True,
    )
    found.add_argument("--nproc-per-node", "--nproc_per_node", type=int, metavar="N", help="default: GPUs, or 2")
    found.add_argument(
        "--max-restarts", "--max_restarts", type=int, default=0, metavar="N", help="times to go on after a crash; 0"
    )
    found.add_argument("--script", type=Path, default=SCRIPT, help="a script of your own that calls trainer.run")
    return found


def main(options: Namespace) -> int:
    """Answers with the exit code of the first worker that failed, where bare torchrun answers 1."""
    from strategies.errors import ConfigError

    if not options.script.is_file():
        raise ConfigError(f"launch: there is no script {options.script}. Name a file (--script).")
    processes = _default_processes() if options.nproc_per_node is None else options.nproc_per_node
    if processes < 1:
        raise ConfigError(
            f"launch: --nproc-per-node={processes} is below 1. Give the number of processes (--nproc-per-node)."
        )
    if options.max_restarts < 0:
        raise ConfigError(f"launch: --max-restarts={options.max_restarts} is below 0. Give 0 or more (--max-restarts).")
    return launch_local(options.script, options.rest, processes, options.max_restarts)


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def launch_local(script: Path, arguments: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `script` in `processes` workers and wait for them.

    A signal to this process (Ctrl-C, SIGTERM) is passed on to the workers, which have ten minutes to
    write a checkpoint; a second one ends them.

    Returns:
        0, or the exit code of the first worker that failed; 128 + the signal's number where a signal ended it.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException

    from trainer.commands.agent import LEAVE_S, Agent, OneMachine, shell_code, telling

    logging.disable(logging.ERROR)  # the workers say what is wrong; torchrun's report would only bury that line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("SHARDWRIGHT_GRACE_S", str(LEAVE_S))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # where a rank is gone, each socket says so in 30 lines
    os.environ["SHARDWRIGHT_LAUNCHER"] = str(os.getpid())
    spec = WorkerSpec(
        role="worker",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", str(script), *arguments),
        rdzv_handler=OneMachine(uuid.uuid4().hex),
        max_restarts=max_restarts,
        monitor_interval=0.2,
    )
    agent = Agent(spec, DefaultLogsSpecs())
    try:
        failures = agent.run().failures.values()
    except SignalException as error:
        return agent.exit_code(otherwise=128 + int(error.sigval))
    finally:
        logging.disable(logging.NOTSET)
    return shell_code(telling(failure.exitcode for failure in failures))
