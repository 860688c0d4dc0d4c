"""Elastic Fabric Adapters: devices, libfabric's provider, and the counters of what went through them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from strategies import ec2
from trainer.doctor.check import Asked, Check, differing, text_of
from trainer.doctor.findings import Finding, Level, listed
from trainer.instances import instances

INFINIBAND = Path("/sys/class/infiniband")
_AMAZON = "0x1d0f"
_LOST = ("rx_drops", "unresponsive_remote_events", "impaired_remote_conn_events", "retrans_timeout_events")
CARRIED = ("tx_bytes", "rdma_read_bytes", "rdma_write_bytes")


class EFACheck(Check):
    """Whether all EFA devices of the instance type are there, libfabric offers them, and NCCL can load its plugin."""

    name = "EFA"
    limit_s = 40.0

    def look(self, asked: Asked) -> dict[str, Any]:
        found: dict[str, Any] = {"devices": devices(), "type": asked.instance_type, "libfabric": None}
        if not found["devices"]:
            return found
        machine = ec2.look()
        return {
            **found,
            "libfabric": machine.libfabric,
            "offered": len(machine.devices),
            "no_devices": machine.no_devices,
            "plugin": None if machine.plugin_path is None else machine.plugin or "of unknown version",
            "no_plugin": machine.no_plugin,
            "installer": machine.installer,
            "gpus": torch.cuda.is_available(),
        }

    def judge(self, found: Any) -> list[Finding]:
        expected = instances().get(found["type"] or "")
        have, wanted = len(found["devices"]), 0 if expected is None else expected.efa
        if not have:
            if not wanted:
                return []
            return [
                self.failure(
                    f"none, and {found['type']} can have {wanted}: everything goes over TCP",
                    "Attach EFA interfaces (EfaEnabled, InterfaceType: efa), and give the container /dev/infiniband",
                )
            ]
        findings = []
        if have < wanted:
            findings.append(
                self.warning(
                    f"{have} of the {wanted} that {found['type']} can have",
                    "Attach all of them; in Kubernetes ask for vpc.amazonaws.com/efa",
                )
            )
        if found["no_devices"]:
            findings.append(self.failure(*_with_advice(f"{have} devices, and libfabric has none", found["no_devices"])))
        if found["no_plugin"] and found["gpus"]:
            findings.append(self.failure(*_with_advice("no plugin for NCCL", found["no_plugin"])))
        plugin = f", aws-ofi-nccl {found['plugin']}" if found["plugin"] else ""
        return findings or [self.ok(f"{have} devices, libfabric {found['libfabric']}, provider efa{plugin}")]

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        found = []
        if text := differing({host: len(each["devices"]) for host, each in hosts.items()}):
            found.append(self.failure(f"the number of devices differs: {text}", "Attach as many to every host"))
        if text := differing({host: each["libfabric"] for host, each in hosts.items()}):
            found.append(self.warning(f"libfabric differs: {text}", "Start all hosts from one image"))
        return found


def _with_advice(what: str, reason: str) -> tuple[str, str]:
    """`reason` ends with what to do."""
    why, _, advice = reason.partition(". ")
    return f"{what}: {why}", advice


def devices(folder: Path = INFINIBAND) -> list[str]:
    """The EFA devices of this host, by name: those of Amazon's among the RDMA devices."""
    if not folder.is_dir():
        return []
    return sorted(each.name for each in folder.iterdir() if text_of(each / "device" / "vendor") == _AMAZON)


def counters(folder: Path = INFINIBAND, net: Path = Path("/sys/class/net")) -> dict[str, int]:
    """Hardware counters of all EFA devices added up (`efa.*`), and errors of the network interfaces (`net.*`)."""
    found: dict[str, int] = {}
    for device in devices(folder):
        for port in sorted((folder / device / "ports").glob("*/hw_counters")):
            for each in port.iterdir():
                with contextlib.suppress(ValueError, TypeError):
                    key = f"efa.{each.name}"
                    found[key] = found.get(key, 0) + int(text_of(each) or "")
    for interface in sorted(net.iterdir()) if net.is_dir() else []:
        for name in ("rx_errors", "tx_errors", "rx_dropped", "tx_dropped"):
            text = text_of(interface / "statistics" / name)
            if interface.name != "lo" and text is not None and text.isdigit():
                found[f"net.{interface.name}.{name}"] = int(text)
    return found


def differences(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What has been counted meanwhile, where anything was."""
    return {key: after[key] - value for key, value in before.items() if after.get(key, value) != value}


def judge_counters(counted: Mapping[str, Mapping[str, int]], *, must_carry: bool) -> list[Finding]:
    """What the counters of each host say of the measurement.

    Args:
        counted: by host, from `differences`.
        must_carry: data went between the hosts, and there are EFA devices for it.
    """
    found = []
    for host, counts in counted.items():
        lost = {key: value for key, value in counts.items() if _is_loss(key)}
        if lost:
            found.append(
                Finding(
                    check="counters",
                    level=Level.warning,
                    what=f"while it was measured: {listed([f'{key} {value:,}' for key, value in lost.items()])}",
                    where=(host,),
                    advice="Look at that host's network; a few drops under full load are usual",
                )
            )
        carried = sum(counts.get(f"efa.{name}", 0) for name in CARRIED)
        if must_carry:
            passed = carried > 0
            found.append(
                Finding(
                    check="counters",
                    level=Level.ok if passed else Level.failure,
                    what=f"{carried:,} bytes went through EFA" if passed else "nothing went through EFA: it was TCP",
                    where=(host,),
                    advice="" if passed else "See the finding on NCCL's network (backend=efa)",
                )
            )
    return found


def _is_loss(key: str) -> bool:
    kind, _, name = key.partition(".")
    return name in _LOST if kind == "efa" else name.endswith("errors")
