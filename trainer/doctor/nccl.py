"""Which network NCCL really uses, from its own words: a plugin that can't be loaded leaves it with TCP, silently."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.doctor.findings import Finding, Level

_ADVICE = "Put aws-ofi-nccl of the EFA installer on LD_LIBRARY_PATH (/opt/amazon/ofi-nccl/lib/...), or use backend=efa"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What NCCL says about its network."""

    name: str | None
    """`AWS Libfabric`, `Libfabric`, `Socket`, `IB`; None: it didn't say."""
    version: str | None
    plugin: str | None
    """aws-ofi-nccl's version; None: it wasn't loaded."""
    provider: str | None
    """libfabric's, such as `efa`."""
    nics: int | None
    direct: bool
    """GPUs and network cards exchange data without the host's memory in between, as far as channels say so."""
    warnings: tuple[str, ...]

    @property
    def by_libfabric(self) -> bool:
        """Through the plugin."""
        return self.name is not None and "Libfabric" in self.name


def read_log(text: str) -> Network:
    """From what NCCL prints with NCCL_DEBUG=INFO; the newest word counts."""
    return Network(
        name=_last(r"Using network (.+?)\s*$", text),
        version=_last(r"NCCL version (\S+)", text),
        plugin=_last(r"(?:Initializing|Using) aws-ofi-nccl (\S+)", text),
        provider=_last(r"Selected [Pp]rovider is (\w+)", text),
        nics=int(found) if (found := _last(r"\(found (\d+) nics\)", text)) else None,
        direct="GDRDMA" in text or "GPU Direct RDMA Enabled" in text,
        warnings=tuple(dict.fromkeys(re.findall(r"NCCL WARN (.+?)\s*$", text, re.MULTILINE)))[:5],
    )


def _last(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text, re.MULTILINE)
    return found[-1] if found else None


class Listening:
    """Within, NCCL writes what it says into a file of this process; ends with `text`."""

    def __init__(self) -> None:
        self.text = ""
        self.why_not: str | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Before the process group is made, until it has been used."""
        outside = [name for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE") if name in os.environ]
        if outside:  # somebody wants to read it where they have it sent
            self.why_not = f"{' and '.join(outside)} set outside: read there what NCCL says of its network"
            yield
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "nccl.log")
            ours = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV", "NCCL_DEBUG_FILE": str(path)}
            kept = {name: os.environ.get(name) for name in ours}
            os.environ.update(ours)
            try:
                yield
            finally:
                for name, value in kept.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
                with contextlib.suppress(OSError):
                    self.text = path.read_text(errors="replace")


def judge_network(found: Mapping[str, Any], *, efa: bool, hosts: int) -> list[Finding]:
    """What is to be thought of the network that NCCL has chosen on one host.

    Args:
        found: `text` and `why_not` of `Listening`.
        efa: the host has EFA devices.
        hosts: number of all.
    """
    if found["why_not"]:
        return [Finding(check="NCCL", level=Level.warning, what=found["why_not"])]
    it = read_log(found["text"])
    if it.name is None:
        return [Finding(check="NCCL", level=Level.warning, what="it doesn't say which network it uses")]
    what = f"network {it.name}"
    if it.plugin is not None:
        what += f", aws-ofi-nccl {it.plugin}"
    if it.provider is not None:
        what += f", provider {it.provider}{f' on {it.nics} cards' if it.nics is not None else ''}"
    findings = [Finding(check="NCCL", level=Level.warning, what=f"it warns: {each}") for each in it.warnings]
    if efa and (not it.by_libfabric or it.provider not in (None, "efa")):
        level = Level.failure if hosts > 1 else Level.warning
        findings.append(Finding(check="NCCL", level=level, what=f"{what}, though there is EFA", advice=_ADVICE))
    else:
        findings.append(Finding(check="NCCL", level=Level.ok, what=what))
    return findings
