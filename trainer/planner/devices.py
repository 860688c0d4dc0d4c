"""What the planner knows of GPUs and other accelerators besides their dense peaks, from `devices.csv`.

The peaks stand in `trainer.metrics.throughput`. Each row says where its numbers come from; what wasn't found in a
source is left empty. NVIDIA's datasheets were read on pages that quote them.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Device:
    """One product; None: not found in a source."""

    pattern: str
    """A regular expression that the device's name holds."""
    memory_gb_per_s: float | None
    host_link_gb_per_s: float | None
    """PCIe, each way: half of what datasheets print. The host's side may be slower."""
    power_w: float | None
    """The most that it may draw."""
    visible_gib: float | None
    """Memory that CUDA offers of it, with nothing running."""
    source: str


@functools.cache
def devices() -> tuple[Device, ...]:
    """All that are known; variants stand before the plain name."""
    with Path(__file__).with_name("devices.csv").open(newline="") as file:
        return tuple(
            Device(
                pattern=row["pattern"],
                memory_gb_per_s=_number(row["memory_gb_per_s"]),
                host_link_gb_per_s=_number(row["host_link_gb_per_s"]),
                power_w=_number(row["power_w"]),
                visible_gib=_number(row["visible_gib"]),
                source=row["source"],
            )
            for row in csv.DictReader(file)
        )


def device_called(name: str) -> Device | None:
    """The first whose pattern is found in `name`; None: not known, or a slice of a device (MIG)."""
    if "MIG" in name.split():
        return None
    return next((device for device in devices() if re.search(device.pattern, name)), None)


def _number(text: str) -> float | None:
    return float(text) if text else None
