"""EC2's machines with accelerators, from `instances.csv`; each row says where its numbers come from.

In a source, `@1d927085` names a commit of karpenter-provider-aws: of its instance-types.md, and for a price of its
zz_generated.pricing_aws.go, which holds EC2's on-demand prices in us-east-1 on the date that stands beside them.
SageMaker's prices are others, and none of them stands here.
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
    devices: int
    """GPUs, or accelerators of another kind."""
    device: str
    """As CUDA calls it, without the vendor."""
    gpu_memory_mib: int
    """Of one GPU or other accelerator, as EC2 states it; the driver leaves less."""
    cpus: int | None
    """vCPUs; None: not written down."""
    memory_gib: int | None
    """Of the host."""
    network_gbps: float | None
    """Of all network cards together, each way; None: not published where the rest was found."""
    efa: int
    """EFA devices, where all are attached."""
    nvlink_gb_per_s: float | None
    """Of one GPU, both ways together, as in datasheets; NeuronLink of a Trainium. None: it has none."""
    disk_gb: int | None
    """Of local NVMe disks together, in 10^9 bytes; 0: it has none; None: not written down."""
    price_per_h: float | None
    """USD, EC2 on-demand in us-east-1; None: there is no such price."""
    price_date: str
    """Of the price; empty without one."""
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
                devices=int(row["devices"]),
                device=row["device"],
                gpu_memory_mib=int(row["gpu_memory_mib"]),
                cpus=int(row["cpus"]) if row["cpus"] else None,
                memory_gib=int(row["memory_gib"]) if row["memory_gib"] else None,
                network_gbps=float(row["network_gbps"]) if row["network_gbps"] else None,
                efa=int(row["efa"]),
                nvlink_gb_per_s=float(row["nvlink_gb_per_s"]) if row["nvlink_gb_per_s"] else None,
                disk_gb=int(row["disk_gb"]) if row["disk_gb"] else None,
                price_per_h=float(row["price_per_h"]) if row["price_per_h"] else None,
                price_date=row["price_date"],
                source=row["source"],
            )
            for row in csv.DictReader(file)
        ]
    return {row.type: row for row in rows}
