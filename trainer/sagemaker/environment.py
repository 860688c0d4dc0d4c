"""Settings that SageMaker's launchers have set for years, put right, and where caches go that a warm pool keeps."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

KEEP = "SHARDWRIGHT_KEEP_ENVIRONMENT"
"""Set to 1 in the job's environment, it leaves everything as it is."""


@dataclass(frozen=True)
class _Old:
    name: str
    value: str
    why: str


# Source: AWS's own list of variables for EFA, awsome-distributed-training, 1.architectures/efa-cheatsheet.md.
_OLD = (
    _Old(
        "NCCL_PROTO", "simple", "needed up to aws-ofi-nccl 1.5; keeps NCCL from its faster protocols for small messages"
    ),
    _Old("NCCL_MIN_NRINGS", "4", "the number of rings is NCCL's to choose"),
    _Old("RDMAV_FORK_SAFE", "1", "its variables must not be set with EFA"),
    _Old("FI_EFA_USE_DEVICE_RDMA", "1", "needed up to aws-ofi-nccl 1.6, which sets it itself since"),
)
_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "HF_HOME": "huggingface",
}


def put_right(variables: MutableMapping[str, str] = os.environ) -> list[str]:
    """Take away what old launchers set, and point caches at what a warm pool keeps.

    Only a value that a launcher writes is touched: another one was set by somebody who meant it.

    Returns:
        One line for each change, for the log.
    """
    if "SM_HPS" not in variables or variables.get(KEEP) == "1":
        return []
    said = []
    for old in _OLD:
        if variables.get(old.name) == old.value:
            del variables[old.name]
            said.append(
                f"{old.name}={old.value}, set by SageMaker's launcher, is taken away: {old.why} ({KEEP}=1 keeps it)"
            )
    interface = variables.get("SM_NETWORK_INTERFACE_NAME")
    if interface and "GLOO_SOCKET_IFNAME" not in variables and variables.get("SM_HOSTS", "[]").count(",") > 0:
        variables["GLOO_SOCKET_IFNAME"] = interface
        said.append(f"GLOO_SOCKET_IFNAME={interface}, as the toolkit says it to NCCL alone")
    if kept := variables.get("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"):
        placed = {name: f"{kept}/{folder}" for name, folder in _CACHES.items() if name not in variables}
        variables.update(placed)
        if placed:
            said.append(f"the warm pool's folder {kept} keeps {', '.join(placed)}")
    return said
