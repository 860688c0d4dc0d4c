"""The machines that a plan is for: an EC2 instance type, numbers of one's own, or the machine at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strategies.errors import ConfigError, nearest
from strategies.precision import Numbers
from trainer.instances import Instance, instances
from trainer.metrics.throughput import peak_flops_of
from trainer.planner.devices import device_called
from trainer.planner.this import Fact, measured

_MOST: dict[str, float] = {
    "nodes": 100_000,
    "devices": 1024,
    "memory_gib": 10_000,
    "peak_tflops": 1e6,
    "memory_gb_per_s": 1e6,
    "link_gb_per_s": 1e5,
    "network_gbps": 1e6,
    "host_memory_gib": 1e6,
    "host_link_gb_per_s": 1e5,
    "disk_gb": 1e7,
    "price": 1e5,
    "power_w": 1e5,
}
"""Far above what there is: a slip of units is more likely."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What a prediction needs to know of a cluster, in bytes, seconds and FLOP/s; None: not known."""

    name: str
    nodes: int
    devices: int
    """Per node; each is one rank."""
    device: str
    memory_bytes: int
    """Of one device: what the driver leaves of it where that is known, else the nominal size."""
    peak_flops: float
    """Dense, of one device, for matrix products in the precision that is planned."""
    memory_bytes_per_s: float | None
    """Of one device."""
    link_bytes_per_s: float | None
    """From one device to the others of its node, each way."""
    network_bytes_per_s: float | None
    """Of one node to the others, each way."""
    efa: bool
    host_memory_bytes: int | None
    """Of one node."""
    host_link_bytes_per_s: float | None
    """Between one device and host memory, each way."""
    disk_bytes: int | None
    """Local disks of one node; 0: it has none."""
    power_w: float | None
    """The most that one device draws."""
    price_per_h: float | None
    """USD for one node."""
    price_note: str
    """What price that is; empty without one."""
    note: str = ""
    """One line on what was measured; empty where nothing was."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its number comes from."""

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.nodes * self.devices

    @property
    def on_processors(self) -> bool:
        """Ranks compute on the host, in its memory."""
        return self.device.strip().lower() == "cpu"

    def on(self, nodes: int) -> Machines:
        """As many of the same machines.

        Raises:
            ConfigError: there are none, or absurdly many.
        """
        _refuse_unlikely("nodes", nodes)
        return dataclasses.replace(self, nodes=nodes)


@dataclass(kw_only=True)
class Cluster:
    """The machines that `shardwright plan` and `strategy=auto` reckon with; nothing else in a run looks at it.

    An instance type brings its numbers from `trainer/instances.csv`, its devices theirs from
    `trainer/planner/devices.csv` and `trainer/metrics/throughput.py`. What is set here counts instead; None: as those
    say.
    """

    instance: str | None = None
    """An EC2 instance type, such as p4d.24xlarge; with SageMaker's `ml.` before it, it has no price of its own."""
    measure: bool = False
    """Take the machine at hand, and measure it for a few seconds."""
    nodes: int = 1
    device: str | None = None
    """What one device is, as CUDA calls it, or `cpu`; only without an instance type."""
    devices: int | None = None
    """Per node."""
    memory_gib: float | None = None
    """Of one device."""
    peak_tflops: float | None = None
    """Of one device: dense, in the precision that is planned."""
    memory_gb_per_s: float | None = None
    """Of one device's memory, 10^9 bytes."""
    link_gb_per_s: float | None = None
    """From one device to the others of its node, each way."""
    network_gbps: float | None = None
    """Of one node, each way, in 10^9 bits."""
    efa: bool | None = None
    host_memory_gib: float | None = None
    """Of one node."""
    host_link_gb_per_s: float | None = None
    """Between one device and host memory, each way."""
    disk_gb: float | None = None
    """Local disks of one node."""
    price: float | None = None
    """USD for one node and hour."""
    power_w: float | None = None
    """The most that one device draws."""

    def __post_init__(self) -> None:
        for key in _MOST:
            if (value := getattr(self, key)) is not None:
                _refuse_unlikely(key, value)
        if self.device is not None and not (self.device.strip() and self.device.isprintable()):
            raise ConfigError(
                f"Cluster: device={self.device!r} is no name. Give one, such as H100 80GB HBM3 (cluster.device)."
            )
        if self.measure and self.device is not None:
            raise ConfigError(
                f"Cluster: measure=true is for the machine at hand, and device={self.device} names another. "
                "Leave one of them out (cluster.measure, cluster.device)."
            )
        if self.instance is None:
            return
        type_ = self._instance()
        if self.measure:
            raise ConfigError(
                f"Cluster: measure=true is for the machine at hand, and instance={self.instance} names a type. "
                "Leave one of them out (cluster.measure, cluster.instance)."
            )
        if self.device is not None:
            raise ConfigError(
                f"Cluster: device={self.device}, and {self.instance} has {type_.device}. "
                "Leave it out, or take cluster=custom (cluster.device)."
            )
        if self.devices is not None and self.devices > type_.devices:
            raise ConfigError(
                f"Cluster: devices={self.devices}, and {self.instance} has {type_.devices}. "
                "Take fewer (cluster.devices)."
            )
        if self.efa and not type_.efa:
            raise ConfigError(f"Cluster: efa=true, and {self.instance} has no EFA. Leave it out (cluster.efa).")

    def facts(self, numbers: Numbers) -> Machines:
        """Everything that is known of these machines.

        Args:
            numbers: what the job computes in; it decides the peak.

        Raises:
            ConfigError: how many devices there are, their memory or their peak isn't known; names the key to set.
        """
        name, device, note, price_note = "custom", self.device or "unknown device", "", ""
        found: dict[str, Fact] = {}
        if self.measure:
            this = measured(numbers, self.devices)
            name, device, note, found = "this machine", this.device, this.line, dict(this.facts)
        elif self.instance is not None:
            type_ = self._instance()
            name, device = self.instance.strip().lower(), type_.device
            found = {**_of_device(device), **_of_instance(type_)}
            if name.startswith("ml."):
                found.pop("price", None)  # EC2's; SageMaker asks another
            elif "price" in found:
                price_note = f"EC2 on-demand us-east-1, {type_.price_date}"
        elif self.device is not None:
            found = _of_device(device)
        if "peak_tflops" not in found and (peak := peak_flops_of(device, numbers)) is not None:
            found["peak_tflops"] = (peak / 1e12, "the maker's datasheet (trainer/metrics/throughput.py)")
        own = {key: getattr(self, key) for key in _FIELDS}
        found |= {key: (value, f"yours (cluster.{key})") for key, value in own.items() if value is not None}
        _refuse_missing(found, name, device, numbers)
        if self.instance is not None and found["devices"][0] > 1 and "host_link_gb_per_s" in found:
            rate, source = found["host_link_gb_per_s"]
            found.setdefault("link_gb_per_s", (rate, f"no NVLink, so as to the host: {source}"))
        values = {target: _scaled(found.get(key), factor) for key, (target, factor) in _FIELDS.items()}
        return Machines(
            name=name,
            nodes=self.nodes,
            device=device,
            efa=self.efa if self.efa is not None else self.instance is not None and self._instance().efa > 0,
            price_note="yours" if self.price is not None else price_note,
            note=note,
            sources={_FIELDS[key][0]: source for key, (_, source) in found.items()},
            **values,
        )

    def _instance(self) -> Instance:
        assert self.instance is not None
        found = instances().get(self.instance.strip().lower().removeprefix("ml."))
        if found is None:
            raise ConfigError(
                f"Cluster: no instance type with accelerators is known as {self.instance!r}. "
                f"{nearest(self.instance, instances())} Or give its numbers with cluster=custom (cluster.instance)."
            )
        return found


_FIELDS: dict[str, tuple[str, int | float]] = {
    "devices": ("devices", 1),
    "memory_gib": ("memory_bytes", 1 << 30),
    "peak_tflops": ("peak_flops", 1e12),
    "memory_gb_per_s": ("memory_bytes_per_s", 1e9),
    "link_gb_per_s": ("link_bytes_per_s", 1e9),
    "network_gbps": ("network_bytes_per_s", 1e9 / 8),
    "host_memory_gib": ("host_memory_bytes", 1 << 30),
    "host_link_gb_per_s": ("host_link_bytes_per_s", 1e9),
    "disk_gb": ("disk_bytes", 10**9),
    "price": ("price_per_h", 1.0),
    "power_w": ("power_w", 1.0),
}
"""Key -> the field of `Machines` that it sets, and what one of its units is there; whole where the factor is."""


def _scaled(fact: Fact | None, factor: float) -> Any:
    if fact is None:
        return None
    return round(fact[0] * factor) if isinstance(factor, int) else fact[0] * factor


def _of_instance(type_: Instance) -> dict[str, Fact]:
    source = f"trainer/instances.csv: {type_.source}"
    link = None if type_.nvlink_gb_per_s is None else type_.nvlink_gb_per_s / 2
    values = {
        "devices": type_.devices,
        "link_gb_per_s": link if type_.devices > 1 else None,
        "network_gbps": type_.network_gbps,
        "host_memory_gib": type_.memory_gib,
        "disk_gb": type_.disk_gb,
        "price": type_.price_per_h,
    }
    found: dict[str, Fact] = {key: (value, source) for key, value in values.items() if value is not None}
    if "memory_gib" not in _of_device(type_.device):
        found["memory_gib"] = (type_.gpu_memory_mib / 1024, f"{source}; nominal, the driver leaves less")
    return found


def _of_device(name: str) -> dict[str, Fact]:
    device = device_called(name)
    if device is None:
        return {}
    values = {
        "memory_gib": device.visible_gib,
        "memory_gb_per_s": device.memory_gb_per_s,
        "host_link_gb_per_s": device.host_link_gb_per_s,
        "power_w": device.power_w,
    }
    source = f"trainer/planner/devices.csv: {device.source}"
    return {key: (value, source) for key, value in values.items() if value is not None}


def _refuse_missing(found: Mapping[str, Fact], name: str, device: str, numbers: Numbers) -> None:
    if "devices" not in found:
        raise ConfigError(
            f"Cluster: {name} doesn't say how many devices a node has. Give their number, or an instance type "
            "(cluster.devices, cluster.instance)."
        )
    if "memory_gib" not in found:
        raise ConfigError(
            f"Cluster: how much memory a device of {name} has isn't known ({device}). Give it in GiB "
            "(cluster.memory_gib)."
        )
    if "peak_tflops" not in found:
        others = [each.name for each in Numbers if peak_flops_of(device, each) is not None]
        instead = f"Take precision={' or '.join(others)}, or give" if others else "Give"
        raise ConfigError(
            f"Cluster: no peak in {numbers.name} is known of {device} ({name}). {instead} its dense TFLOP/s "
            f"(cluster.peak_tflops{', precision' if others else ''})."
        )


def _refuse_unlikely(key: str, value: float) -> None:
    if not 0 < value <= _MOST[key]:
        why = "is not above 0" if value <= 0 else f"is not a number up to {_MOST[key]:,g}"
        raise ConfigError(f"Cluster: {key}={value} {why}. Give another (cluster.{key}).")
