"""What an EC2 machine is, and what it has for EFA: devices, libfabric, NCCL and its plugin. Nothing is changed here."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

INSTALLED = Path("/opt/amazon")
"""Where AWS's installer puts libfabric, and what it notes of itself."""
PLUGIN = "libnccl-net.so"
"""What NCCL loads unless it is told another name."""
NAMED = "ofi"
"""How it is told of libnccl-net-ofi.so, which is all that NVIDIA's containers have."""

_NO_DATA = 61
_TAKE = (
    "Take an instance type with EFA and attach its interfaces (a container needs /dev/infiniband and unlimited locked "
    "memory)"
)
_LONGEST_S = 60
_FILTERS = ("FI_", "RDMAV_", "IBV_")
# As NCCL does: the loader decides, and its reason is the best one to give.
_LOAD = """
import ctypes, sys
def mapped():
    with open("/proc/self/maps") as lines:
        return {line.split(maxsplit=5)[5].strip() for line in lines if "/" in line}
before = mapped()
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.exit(str(error))
print("\\n".join(sorted(path for path in mapped() - before if "nccl" in path.rsplit("/", 1)[-1])))
"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found; a version is None where it isn't installed or doesn't say."""

    instance: str | None = None
    """Instance type, such as p5.48xlarge."""
    kernel: str
    installer: str | None = None
    """Version of AWS's EFA installer."""
    libfabric: str | None = None
    devices: tuple[str, ...] = ()
    """EFA devices by libfabric's names."""
    no_devices: str = ""
    """Why there are none, with what to do."""
    plugin: str | None = None
    """Version of aws-ofi-nccl."""
    plugin_path: Path | None = None
    no_plugin: str = ""
    """Why there is none, with what to do."""
    plugin_word: str | None = None
    """What NCCL_NET_PLUGIN has to be for NCCL to find it; None: as it is."""
    nccl: str | None = None

    def describe(self) -> str:
        """One line for people."""
        plugin = f"aws-ofi-nccl {self.plugin or 'of unknown version'} ({self.plugin_path})"
        return (
            f"{len(self.devices)} devices on {self.instance or 'a machine that does not say its type'}, "
            f"libfabric {self.libfabric or 'of unknown version'}, {plugin if self.plugin_path else 'no plugin'}, "
            f"NCCL {self.nccl or 'of unknown version'}, kernel {self.kernel}"
            + (f", EFA installer {self.installer}" if self.installer else "")
        )


def look(variables: Mapping[str, str] = os.environ) -> Machine:
    """Ask the programs and libraries of this machine; takes about a second."""
    libfabric, devices, no_devices = _devices(variables)
    plugin, path, no_plugin = _plugin(variables, variables.get("NCCL_NET_PLUGIN") or PLUGIN)
    word = None
    if path is None and "NCCL_NET_PLUGIN" not in variables:
        version, named, _ = _plugin(variables, f"libnccl-net-{NAMED}.so")
        if named is not None:
            plugin, path, no_plugin, word = version, named, "", NAMED
    return Machine(
        instance=instance_type(),
        kernel=platform.release(),
        installer=_installer(),
        libfabric=libfabric,
        devices=devices,
        no_devices=no_devices,
        plugin=plugin,
        plugin_path=path,
        no_plugin=no_plugin,
        plugin_word=word,
        nccl=_nccl(),
    )


def instance_type() -> str | None:
    """As far as this machine says so: in SageMaker's variable, or in the tables of EC2's firmware."""
    if said := os.environ.get("SM_CURRENT_INSTANCE_TYPE"):
        return said.removeprefix("ml.")
    tables = Path("/sys/devices/virtual/dmi/id")
    with contextlib.suppress(OSError):
        if (tables / "sys_vendor").read_text().strip() == "Amazon EC2":
            return (tables / "product_name").read_text().strip()
    return None


def _devices(variables: Mapping[str, str]) -> tuple[str | None, tuple[str, ...], str]:
    """libfabric's version, the EFA devices it offers, and why there are none."""
    own = INSTALLED / "efa" / "bin" / "fi_info"
    program = str(own) if own.is_file() else shutil.which("fi_info", path=variables.get("PATH"))
    if program is None:
        return None, (), f"libfabric's fi_info is neither in {own.parent} nor on PATH. Install AWS's EFA software"
    # Without the variables that filter, or that make libfabric abort: those are judged apart.
    bare = {name: value for name, value in variables.items() if not name.startswith(_FILTERS)}
    try:
        version = _run([program, "--version"], bare)
        found = _run([program, "-p", "efa"], bare)
    except (OSError, subprocess.SubprocessError) as error:
        return None, (), f"{program} doesn't answer: {_first_line(str(error))}. Install AWS's EFA software anew"
    said = re.search(r"libfabric:\s*(\S+)", version.stdout)
    libfabric = None if said is None else said[1]
    if found.returncode == _NO_DATA:
        reason = f"fi_info -p efa finds no EFA device (exit code {_NO_DATA}, libfabric {libfabric}). {_TAKE}"
        return libfabric, (), reason
    names = re.findall(r"^\s*domain:\s*(\S+?)(?:-rdm|-dgrm)?\s*$", found.stdout, re.MULTILINE)
    if found.returncode or not names:
        reason = f"ends with {found.returncode}: {_first_line(found.stderr) or 'it names no device'}"
        return libfabric, (), f"{program} -p efa {reason}. Install AWS's EFA software anew"
    return libfabric, tuple(dict.fromkeys(names)), ""


def _plugin(variables: Mapping[str, str], wanted: str) -> tuple[str | None, Path | None, str]:
    """Version and path of the plugin that NCCL would load, and why there is none."""
    reasons = []
    for name in _names(wanted):
        try:
            loaded = _run([sys.executable, "-I", "-S", "-c", _LOAD, name], dict(variables))
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(_first_line(str(error)))
            continue
        if loaded.returncode:
            reasons.append(_first_line(loaded.stderr))
            continue
        paths = [Path(line) for line in loaded.stdout.splitlines()]
        for path in paths:
            if version := _version_in(path):
                return version, path, ""
        return None, paths[0] if paths else Path(name), ""
    known = [place for place in _known_places() if place.is_file()]
    what_to_do = f"Put {known[0].parent} into LD_LIBRARY_PATH" if known else "Install aws-ofi-nccl (in AWS's installer)"
    return None, None, f"NCCL's plugin for libfabric can't be loaded: {reasons[0] if reasons else wanted}. {what_to_do}"


def _names(wanted: str) -> list[str]:
    """What NCCL tries for NCCL_NET_PLUGIN: a list of names or paths, each of them also as a suffix."""
    found = []
    for name in filter(None, wanted.split(",")):
        found.append(name)
        if "/" not in name and not (name.startswith("lib") and name.endswith(".so")):
            found.append(f"libnccl-net-{name}.so")
    return found


def _known_places() -> list[Path]:
    """Where installers of this software have put it."""
    found = (INSTALLED / "ofi-nccl").glob("lib*/**/libnccl-net*.so")
    return [*sorted(found, reverse=True), Path("/opt/aws-ofi-nccl/lib") / PLUGIN]


def _version_in(library: Path) -> str | None:
    """The plugin prints `Initializing aws-ofi-nccl 1.21.1` when it starts; the text lies in the file."""
    with contextlib.suppress(OSError):
        if said := re.search(rb"aws-ofi-nccl v?(\d+(?:\.\d+)+)", library.read_bytes()):
            return said[1].decode()
    return None


def _installer() -> str | None:
    with contextlib.suppress(OSError):
        text = (INSTALLED / "efa_installed_packages").read_text(errors="replace")
        if said := re.search(r"EFA installer version:\s*(\d+(?:\.\d+)+)", text):
            return said[1]
    return None


def _nccl() -> str | None:
    """None in a torch without CUDA."""
    with contextlib.suppress(AttributeError, RuntimeError, OSError):
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return None


def _run(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=variables, capture_output=True, text=True, errors="replace", timeout=_LONGEST_S, check=False
    )


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "")
