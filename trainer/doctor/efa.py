"""Elastic Fabric Adapters: devices, libfabric's provider, and the counters of what went through them."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.doctor.check import Asked, Check, differing, text_of
from trainer.doctor.findings import Finding, Level, listed
from trainer.doctor.instances import instances

INFINIBAND = Path("/sys/class/infiniband")
_AMAZON = "0x1d0f"
_OF_THE_INSTALLER = "/opt/amazon/efa/bin"
_LOST = ("rx_drops", "unresponsive_remote_events", "impaired_remote_conn_events", "retrans_timeout_events")
CARRIED = ("tx_bytes", "rdma_read_bytes", "rdma_write_bytes")


class EFACheck(Check):
    """Whether all EFA devices of the instance type are there, and libfabric offers them."""

    name = "EFA"

    def look(self, asked: Asked) -> dict[str, Any]:
        return {"devices": devices(), "type": asked.instance_type, "libfabric": libfabric()}

    def judge(self, found: Any) -> list[Finding]:
        expected = instances().get(found["type"] or "")
        have, libfabric = len(found["devices"]), found["libfabric"]
        wanted = 0 if expected is None else expected.efa
        said = f"libfabric {libfabric['version'] or 'is not installed'}"
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
        if libfabric["efa"] is False:
            findings.append(
                self.failure(
                    f"{have} devices, and {said} offers no provider efa ({libfabric['said']})",
                    "Install the EFA software (efa_installer.sh) in the image, and put /opt/amazon/efa/bin on PATH",
                )
            )
        elif libfabric["efa"] is None:
            findings.append(self.warning(f"{have} devices, and no fi_info to ask", "Install the EFA software"))
        return findings or [self.ok(f"{have} devices, {said}, provider efa")]

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        found = []
        if text := differing({host: len(each["devices"]) for host, each in hosts.items()}):
            found.append(self.failure(f"the number of devices differs: {text}", "Attach as many to every host"))
        if text := differing({host: each["libfabric"]["version"] for host, each in hosts.items()}):
            found.append(self.warning(f"libfabric differs: {text}", "Start all hosts from one image"))
        return found


def devices(folder: Path = INFINIBAND) -> list[str]:
    """The EFA devices of this host, by name: those of Amazon's among the RDMA devices."""
    if not folder.is_dir():
        return []
    return sorted(each.name for each in folder.iterdir() if text_of(each / "device" / "vendor") == _AMAZON)


def libfabric() -> dict[str, Any]:
    """What fi_info says: its library's version, and whether there is a provider efa (None: no fi_info)."""
    program = shutil.which("fi_info") or shutil.which("fi_info", path=_OF_THE_INSTALLER)
    if program is None:
        return {"version": None, "efa": None, "said": "no fi_info"}
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    offered = subprocess.run([program, "-p", "efa"], capture_output=True, text=True, timeout=15, check=False)
    return read_fi_info(version.stdout, offered.returncode, offered.stdout, offered.stderr)


def read_fi_info(version: str, code: int, out: str, err: str) -> dict[str, Any]:
    """From what `fi_info --version` and `fi_info -p efa` print; the latter ends with 61 (ENODATA) without a device."""
    match = re.search(r"libfabric: (\S+)", version)
    offered = code == 0 and re.search(r"^provider: efa\b", out, re.MULTILINE) is not None
    said = "exit code 61: no EFA device" if code == 61 else f"exit code {code}: {' '.join(err.split())[:80]}"
    return {"version": match[1] if match else None, "efa": offered, "said": "" if offered else said}


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
