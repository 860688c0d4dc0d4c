"""What EC2's instance types should have, from `instances.csv`; each row says where its numbers come from."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from strategies import ec2
from strategies.errors import ConfigError, nearest
from trainer.doctor.check import text_of

_SAGEMAKER = Path("/opt/ml/input/config/resourceconfig.json")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance type."""

    type: str
    gpus: int
    gpu: str
    """Part of the GPU's name."""
    network_gbps: float | None
    """Of all network cards together, each way; None: not published where the rest was found."""
    efa: int
    """EFA devices, where all are attached."""
    nvlink_gb_per_s: float | None
    """Of one GPU, both ways together, as in datasheets."""
    source: str


@functools.cache
def instances() -> dict[str, Instance]:
    """All that are known, by type."""
    with Path(__file__).with_name("instances.csv").open(newline="") as file:
        rows = [
            Instance(
                type=row["type"],
                gpus=int(row["gpus"]),
                gpu=row["gpu"],
                network_gbps=float(row["network_gbps"]) if row["network_gbps"] else None,
                efa=int(row["efa"]),
                nvlink_gb_per_s=float(row["nvlink_gb_per_s"]) if row["nvlink_gb_per_s"] else None,
                source=row["source"],
            )
            for row in csv.DictReader(file)
        ]
    return {row.type: row for row in rows}


def given(name: str) -> str:
    """An instance type that somebody wrote down, without SageMaker's `ml.`.

    Raises:
        ConfigError: there is nothing to hold it against.
    """
    found = name.strip().lower().removeprefix("ml.")
    if found not in instances():
        raise ConfigError(
            f"doctor: nothing is known of the instance type {name}. {nearest(found, instances())} (--instance-type)."
        )
    return found


def detected() -> str | None:
    """This machine's, as far as SageMaker's variable or file or the firmware's tables say so."""
    if said := ec2.instance_type():
        return said
    if written := text_of(_SAGEMAKER):
        try:
            return str(json.loads(written)["current_instance_type"]).removeprefix("ml.")
        except (ValueError, KeyError, TypeError):
            return None
    return None
