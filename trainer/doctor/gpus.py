"""NVIDIA's GPUs and their health, as nvidia-smi and the kernel's log tell it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.doctor.check import Asked, Check, differing
from trainer.doctor.findings import Finding, listed
from trainer.instances import instances

_BASE = ("index", "name", "uuid", "driver_version", "memory.total", "memory.used", "temperature.gpu", "power.draw",
         "power.limit", "pstate")  # fmt: skip
# Asked for apart: a driver that doesn't know one of them answers none.
_MORE: tuple[tuple[str, ...], ...] = (
    ("ecc.errors.uncorrected.volatile.total", "ecc.errors.corrected.volatile.total"),
    ("retired_pages.double_bit.count", "retired_pages.single_bit_ecc.count", "retired_pages.pending"),
    ("pcie.link.width.current", "pcie.link.width.max"),
    ("power.default_limit",),
)
_SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_REMAPPED = ("remapped_rows.pending", "remapped_rows.failure")
_HOT_C = 88
# Of NVIDIA's list of Xid errors: those after which the GPU, its memory or its links can't be trusted.
_GRAVE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 136, 140, 143}
_XID = re.compile(r"NVRM: Xid \((?P<gpu>[^)]*)\): (?P<number>\d+)")


class GPUsCheck(Check):
    """How many GPUs there are, and how well they are."""

    name = "GPUs"
    program = "nvidia-smi"

    def look(self, asked: Asked) -> dict[str, Any]:
        if shutil.which(self.program) is None:
            return {"gpus": None, "type": asked.instance_type, "xids": []}
        gpus = self._query("--query-gpu", _BASE)
        for fields in _MORE:
            _join(gpus, self._query("--query-gpu", fields))
        for name in ("clocks_event_reasons", "clocks_throttle_reasons"):  # the second before driver 535
            found = self._query("--query-gpu", [f"{name}.{each}" for each in _SLOWDOWNS])
            if found:
                _join(gpus, [{key.partition(".")[2]: value for key, value in each.items()} for each in found])
                break
        _join(gpus, self._query("--query-remapped-rows", _REMAPPED))
        return {"gpus": gpus, "type": asked.instance_type, "xids": xids(_kernel_log())}

    def _query(self, what: str, fields: Sequence[str]) -> list[dict[str, str]]:
        words = [self.program, f"{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=15, check=False)
        if done.returncode != 0:
            if fields is _BASE:
                said = " ".join((done.stdout or done.stderr).split())
                raise RuntimeError(f"nvidia-smi ends with {done.returncode}: {said[:200]}")
            return []
        return rows(done.stdout, fields)

    def judge(self, found: Any) -> list[Finding]:
        gpus, expected = found["gpus"], instances().get(found["type"] or "")
        if gpus is None:
            if expected is not None and expected.gpus:
                what = f"no nvidia-smi, and {expected.type} has {expected.gpus} {expected.gpu}"
                return [self.failure(what, "Take an image with NVIDIA's driver, and let the container see it")]
            return []
        findings = []
        if expected is not None and len(gpus) < expected.gpus:
            what = f"{len(gpus)} of the {expected.gpus} {expected.gpu} that {expected.type} has"
            findings.append(self.failure(what, "Give the container all of them, or replace the host"))
        for gpu in gpus:
            findings += [self._about(gpu, *each) for each in troubles(gpu)]
        for number, where in found["xids"]:
            grave = number in _GRAVE_XIDS
            say = self.failure if grave else self.warning
            findings.append(
                say(
                    f"Xid {number} of {where} in the kernel's log",
                    "Replace the host, or reset the GPU" if grave else "Look it up in NVIDIA's list of Xid errors",
                )
            )
        names = sorted({gpu["name"] for gpu in gpus})
        return findings or [self.ok(f"{len(gpus)} {listed(names)}, {_range(gpus, 'temperature.gpu')} °C, healthy")]

    def _about(self, gpu: Mapping[str, str], grave: bool, what: str, advice: str) -> Finding:
        say = self.failure if grave else self.warning
        return say(f"GPU {gpu['index']}: {what}", advice)

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        kinds = {host: listed(sorted({each["name"] for each in it["gpus"] or []})) for host, it in hosts.items()}
        counts = {host: len(it["gpus"] or []) for host, it in hosts.items()}
        found = []
        for what, values in (("kind", kinds), ("number", counts)):
            if text := differing(values):
                found.append(self.failure(f"their {what} differs: {text}", "Use hosts of one kind: all wait for one"))
        return found


def troubles(gpu: Mapping[str, str]) -> list[tuple[bool, str, str]]:
    """What is wrong with a GPU: whether it is grave, what, and what to do."""
    found = []
    if (errors := number(gpu, "ecc.errors.uncorrected.volatile.total")) > 0:
        found.append((True, f"{errors:.0f} memory errors that ECC could not correct", "Reset it, or replace the host"))
    if (errors := number(gpu, "ecc.errors.corrected.volatile.total")) > 1000:
        found.append((False, f"{errors:,.0f} memory errors that ECC corrected", "Watch it"))
    if gpu.get("remapped_rows.failure") in ("Yes", "1"):
        found.append((True, "a row of its memory could not be remapped", "Replace the host"))
    if "Yes" in (gpu.get("retired_pages.pending"), gpu.get("remapped_rows.pending")) or (
        gpu.get("remapped_rows.pending") == "1"
    ):
        found.append((False, "memory waits to be retired", "Reset the GPU, or restart the host"))
    if (pages := number(gpu, "retired_pages.double_bit.count")) > 0:
        found.append((False, f"{pages:.0f} pages of its memory are retired", "Watch it; NVIDIA replaces at 60"))
    for reason in _SLOWDOWNS:
        if gpu.get(reason) == "Active":
            words = {"hw_power_brake_slowdown": "for want of power", "hw_slowdown": "by its own hardware"}
            why = words.get(reason, "by heat")
            found.append((reason.startswith("hw"), f"slowed down {why} ({reason})", "Replace the host"))
    if (heat := number(gpu, "temperature.gpu")) >= _HOT_C:
        found.append((False, f"{heat:.0f} °C", "See whether it is slowed down under load"))
    allowed, usual = number(gpu, "power.limit"), number(gpu, "power.default_limit")
    if 0 < allowed < 0.95 * usual:
        found.append((False, f"held to {allowed:.0f} of {usual:.0f} W", "nvidia-smi -pl, if that was not meant"))
    width, most = number(gpu, "pcie.link.width.current"), number(gpu, "pcie.link.width.max")
    if 0 < width < most:
        found.append((True, f"{width:.0f} of {most:.0f} PCIe lanes", "Replace the host: its way to the GPU is narrow"))
    return found


def number(gpu: Mapping[str, str], field: str) -> float:
    """Of a field; 0 where nvidia-smi has none for this GPU."""
    try:
        return float(gpu.get(field, ""))
    except ValueError:  # [N/A], [Not Supported]
        return 0.0


def rows(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Lines of nvidia-smi's CSV, by field; a line of another length is left out."""
    split = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(fields, cells, strict=True)) for cells in split if len(cells) == len(fields)]


def xids(log: str) -> list[tuple[int, str]]:
    """Number and GPU of each Xid error in a kernel's log, each once."""
    found = [(int(match["number"]), match["gpu"]) for match in _XID.finditer(log)]
    return list(dict.fromkeys(found))


def _kernel_log() -> str:
    """Empty where it may not be read."""
    if shutil.which("dmesg") is None:
        return ""
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
    return done.stdout if done.returncode == 0 else ""


def _join(gpus: list[dict[str, str]], more: Sequence[Mapping[str, str]]) -> None:
    if len(more) == len(gpus):
        for gpu, each in zip(gpus, more, strict=True):
            gpu.update(each)


def _range(gpus: Sequence[Mapping[str, str]], field: str) -> str:
    values = sorted({round(number(gpu, field)) for gpu in gpus})
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
