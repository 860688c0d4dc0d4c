"""The entry point of a SageMaker training job's container: starts the processes, and passes a SIGTERM on to them.

SageMaker's toolkit keeps the signal to itself, so that a job that is stopped or interrupted loses what it did since its
last checkpoint.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from trainer.commands import Parser

_PORT = 7777
_GRACE_S = 110
"""Of the 120 that the service leaves between SIGTERM and the kill."""


def parser() -> Parser:
    """`shardwright container`'s own options."""
    found = Parser(
        "container",
        "Be the entry point of a SageMaker training job's container, without its toolkit: reads the job's "
        "configuration below /opt/ml, starts the training script in one process per GPU on each host, and lets it "
        "write a checkpoint when the job is stopped. Environment: SHARDWRIGHT_SCRIPT (a path in the channel `code`), "
        "SHARDWRIGHT_PROCESSES (per host), SHARDWRIGHT_MAX_RESTARTS, SAGEMAKER_BASE_DIR (in place of /opt/ml).",
    )
    return found


def main(options: Namespace) -> int:
    """Answers with the exit code of the first process that failed; the reason stands in the failure file."""
    from strategies.errors import ConfigError
    from trainer.sagemaker.failure import write_failure

    base = Path(os.environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml")
    os.environ["SM_OUTPUT_FAILURE"] = str(base / "output" / "failure")
    try:
        code = _run(base)
    except ConfigError as error:
        write_failure(f"ConfigError: {error}")
        raise
    if code:
        write_failure(f"TrainingError: the training script ended with exit code {code}; its log says why")
    return code


def _run(base: Path) -> int:
    from strategies.errors import ConfigError
    from strategies.launchers import number_in
    from trainer.launch.agent import Meeting
    from trainer.launch.local import launch_local
    from trainer.launch.local_job import SCRIPTS

    hosts, mine = describe_job(base, os.environ)
    os.environ.setdefault("SHARDWRIGHT_GRACE_S", str(_GRACE_S))
    restarts = number_in(os.environ, "SHARDWRIGHT_MAX_RESTARTS", 0)
    if restarts and len(hosts) > 1:
        raise ConfigError(
            f"SageMaker: SHARDWRIGHT_MAX_RESTARTS={restarts} is for a job on one host, and this one has {len(hosts)}. "
            "Let the service start the job again (launcher.retries)."
        )
    processes = number_in(os.environ, "SHARDWRIGHT_PROCESSES", 0) or max(1, int(os.environ["SM_NUM_GPUS"]))
    script = os.environ.get("SHARDWRIGHT_SCRIPT")
    path = SCRIPTS / "train.py" if script is None else base / "input" / "data" / "code" / script
    if not path.is_file():
        raise ConfigError(f"SageMaker: there is no script {path}. Name one of the channel code (SHARDWRIGHT_SCRIPT).")
    meeting = Meeting.among(hosts, hosts.index(mine), _PORT) if len(hosts) > 1 else None
    return launch_local(path, [], processes, restarts, meeting)


def describe_job(base: Path, variables: MutableMapping[str, str]) -> tuple[list[str], str]:
    """Put into `variables` what the toolkit would: the job's configuration, its channels and folders.

    Args:
        base: what /opt/ml is.
        variables: of the environment.

    Returns:
        The names of all hosts, and this one's.

    Raises:
        ConfigError: a file that the service writes is missing or isn't what it should be.
    """
    import torch

    resources, hyperparameters = _read(base, "resourceconfig"), _read(base, "hyperparameters")
    channels = _read(base, "inputdataconfig", optional=True)
    hosts, mine = _hosts(resources)
    interface = str(resources.get("network_interface_name") or "eth0")
    found = {
        "SM_HPS": json.dumps(hyperparameters),
        "SM_HOSTS": json.dumps(hosts),
        "SM_CURRENT_HOST": mine,
        "SM_CURRENT_INSTANCE_TYPE": str(resources.get("current_instance_type") or ""),
        "SM_NETWORK_INTERFACE_NAME": interface,
        "SM_CHANNELS": json.dumps(sorted(channels)),
        "SM_NUM_GPUS": str(torch.cuda.device_count()),
        "SM_NUM_CPUS": str(os.cpu_count() or 1),
        "SM_MODEL_DIR": str(base / "model"),
        "SM_OUTPUT_DIR": str(base / "output"),
        "SM_OUTPUT_DATA_DIR": str(base / "output" / "data"),
    }
    found |= {f"SM_CHANNEL_{name.upper()}": str(base / "input" / "data" / name) for name in channels}
    variables.update({name: value for name, value in found.items() if value})
    if len(hosts) > 1:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            variables.setdefault(name, interface)
    return hosts, mine


def _read(base: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    from strategies.errors import ConfigError

    path = base / "input" / "config" / f"{name}.json"
    try:
        found = json.loads(path.read_text() or "{}")
        if isinstance(found, dict):
            return found
        why = "it holds no object"
    except FileNotFoundError:
        if optional:
            return {}
        why = "it isn't there"
    except (OSError, ValueError) as error:
        why = str(error)
    raise ConfigError(f"SageMaker: {path} can't be read: {why}. The service writes it when a job starts.")


def _hosts(resources: Mapping[str, Any]) -> tuple[list[str], str]:
    from strategies.errors import ConfigError

    hosts, mine = resources.get("hosts"), resources.get("current_host")
    if isinstance(hosts, list) and mine in hosts:
        return [str(host) for host in hosts], str(mine)
    raise ConfigError(
        f"SageMaker: resourceconfig.json names the hosts {hosts} and this one as {mine!r}. The service writes it "
        "when a job starts."
    )
