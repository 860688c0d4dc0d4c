"""EC2's machines with accelerators, from `instances.csv`; each row says where its numbers come from.

Processors and memory are those of EC2's instance type pages, and stand only where a launcher asks for them.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance type."""

    type: str
    gpus: int
    gpu: str
    """Part of the GPU's name."""
    cpus: int | None
    """vCPUs; None: not written down."""
    memory_gib: int | None
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
                cpus=int(row["cpus"]) if row["cpus"] else None,
                memory_gib=int(row["memory_gib"]) if row["memory_gib"] else None,
                network_gbps=float(row["network_gbps"]) if row["network_gbps"] else None,
                efa=int(row["efa"]),
                nvlink_gb_per_s=float(row["nvlink_gb_per_s"]) if row["nvlink_gb_per_s"] else None,
                source=row["source"],
            )
            for row in csv.DictReader(file)
        ]
    return {row.type: row for row in rows}
