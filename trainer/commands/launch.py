"""Start the training script in several processes of this machine, with torchrun's own machinery."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import ConfigError

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "train.py"


def main(words: Sequence[str]) -> int:
    """Answers with the exit code of the first worker that failed, where bare torchrun answers 1."""
    parser = argparse.ArgumentParser(
        prog="shardwright launch",
        description="Train with several processes on this machine. What follows the options goes to the training "
        "script, as in: shardwright launch --nproc-per-node 2 trainer.max_steps=100",
    )
    parser.add_argument("--nproc-per-node", type=int, default=None, metavar="N", help="processes; default: GPUs, or 2")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="restarts after a worker has died")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="a script of your own that calls trainer.run")
    options, rest = parser.parse_known_args(list(words))
    if not options.script.is_file():
        raise ConfigError(f"launch: there is no script {options.script}. Name a file (--script).")
    processes = _default_processes() if options.nproc_per_node is None else options.nproc_per_node
    if processes < 1:
        raise ConfigError(f"launch: --nproc-per-node={processes} is below 1. Give the number of processes.")
    return launch_local(options.script, rest, processes, options.max_restarts)


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def launch_local(script: Path, arguments: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run `script` in `processes` workers and wait for them.

    Returns:
        0, or the exit code of the first worker that failed; 128 + the signal's number where this process was told to
        stop (the workers are told, and have 30 s to write a checkpoint).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The workers say what is wrong; torchrun's report of it would only bury that line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
