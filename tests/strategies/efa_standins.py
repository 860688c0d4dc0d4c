"""A machine with EFA, made of stand-ins: a `fi_info` that answers as libfabric's, a library that NCCL could load."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from strategies import ec2

DEVICE = """provider: efa
    fabric: {fabric}
    domain: {name}-rdm
    version: 126.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: {fabric}
    domain: {name}-dgrm
    version: 126.0
    type: FI_EP_DGRAM
    protocol: FI_PROTO_EFA
"""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What such a machine has; None: it isn't there."""

    libfabric: str | None = "2.6.0amzn1.0"
    plugin: str | None = "1.21.1"
    nccl: tuple[int, ...] | None = (2, 29, 7)
    kernel: str = "6.8.0-1050-aws"
    instance: str = "p5.48xlarge"
    devices: tuple[str, ...] = ("rdmap79s0", "rdmap80s0")
    file: str = ec2.PLUGIN

    def build(self, folder: Path) -> dict[str, str]:
        """Write the files; answers with the variables under which they are found."""
        programs, libraries = folder / "bin", folder / "lib"
        programs.mkdir(parents=True)
        libraries.mkdir()
        if self.libfabric is not None:
            write_fi_info(programs, self.libfabric, self.devices)
        if self.plugin is not None:
            write_plugin(libraries / self.file, self.plugin)
        return {
            "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin" if self.libfabric else str(programs),
            "LD_LIBRARY_PATH": str(libraries),
            "SM_CURRENT_INSTANCE_TYPE": self.instance,
        }

    def install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """The same for this process, and what no file can stand in for: the kernel's version, and NCCL's."""
        variables = self.build(folder)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ec2, "INSTALLED", folder / "amazon")
        monkeypatch.setattr(ec2.platform, "release", lambda: self.kernel)
        monkeypatch.setattr(torch.cuda.nccl, "version", self._nccl_version)
        return variables

    def _nccl_version(self) -> tuple[int, ...]:
        if self.nccl is None:
            raise AttributeError("torch without CUDA")
        return self.nccl


def write_fi_info(folder: Path, libfabric: str, devices: tuple[str, ...]) -> None:
    """Answers 61 where there is no device, or where a filter hides them; dies of what makes libfabric abort."""
    fabric = "efa" if libfabric >= "1.13" else "EFA-fe80::94:3dff:fe89:1b70"
    text = "".join(DEVICE.format(fabric=fabric, name=name) for name in devices)
    answer = f"printf %s {shlex.quote(text)}" if devices else "echo 'fi_getinfo: -61' >&2; exit 61"
    script = f"""#!/bin/sh
[ -z "$FI_EFA_MTU_SIZE" ] || exit 134
case "$1" in
--version) printf 'fi_info: %s\\nlibfabric: %s\\nlibfabric api: 1.22\\n' {libfabric} {libfabric} ;;
-p) [ "${{FI_PROVIDER:-efa}}" = efa ] || {{ echo 'fi_getinfo: -61' >&2; exit 61; }}
    {answer} ;;
esac
"""
    path = folder / "fi_info"
    path.write_text(script)
    path.chmod(0o755)


def write_plugin(path: Path, version: str) -> None:
    """A library that can be loaded, with the text that the real one prints when it starts."""
    with Path("/proc/self/maps").open() as lines:
        real = next(line.split(maxsplit=5)[5].strip() for line in lines if "/libm.so" in line or "/libm-" in line)
    path.write_bytes(Path(real).read_bytes() + b"\0NET/OFI Initializing aws-ofi-nccl " + version.encode() + b"\0")
