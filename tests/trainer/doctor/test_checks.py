"""What is looked at on a host, with stand-ins for what this machine lacks."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from strategies.errors import ConfigError
from trainer.doctor.check import Asked
from trainer.doctor.disk import DiskCheck
from trainer.doctor.efa import EFACheck, counters, devices, differences, judge_counters
from trainer.doctor.findings import Level
from trainer.doctor.gpus import GPUsCheck, troubles, xids
from trainer.doctor.host import LimitsCheck, MemoryCheck, SharedMemoryCheck, VersionsCheck
from trainer.doctor.instances import detected, given
from trainer.doctor.nccl import Listening, judge_network, read_log
from trainer.doctor.network import InterfacesCheck, NamesCheck
from trainer.instances import instances

ASKED = Asked(host="a", hosts=("a",))


def stand_in(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program on PATH, and besides it only the shell's."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


# Versions, memory, limits.


def test_versions_that_differ_between_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_PROTO", "simple")
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/tmp/x.%h")
    here = VersionsCheck().look(ASKED)
    assert here["settings"] == {**here["settings"], "NCCL_PROTO": "simple"}
    assert "NCCL_DEBUG_FILE" not in here["settings"]
    [ok] = VersionsCheck().judge(here)
    assert f"torch {here['torch']}" in ok.what
    other = {**here, "torch": "2.6.0", "kernel": "6.1", "settings": {}}
    found = VersionsCheck().compare({"a": here, "b": other, "c": here})
    texts = {each.what: each.level for each in found}
    assert texts[f"torch differs: 2.6.0 on b; {here['torch']} on a, c"] is Level.failure
    assert texts["NCCL_PROTO differs: none on b; simple on a, c"] is Level.warning
    assert any(text.startswith("kernel differs") and level is Level.warning for text, level in texts.items())
    assert VersionsCheck().compare({"a": here, "c": here}) == []


def test_memory_short_or_crowded_is_a_warning() -> None:
    here = MemoryCheck().look(Asked(host="a", hosts=("a",), ranks_here=4, threads=9))
    assert here["threads"] == 9
    well = {"total_gib": 64.0, "free_gib": 60.0, "limit_gib": 16.0, "cpus": 8, "ranks": 4, "threads": 2}
    [ok] = MemoryCheck().judge(well)
    assert ok.what == "60.0 of 64.0 GiB free, 16.0 GiB allowed here; 8 processors for 4 ranks of 2 threads"
    _, crowded = MemoryCheck().judge({**well, "threads": 8})
    assert (crowded.level, crowded.advice) == (Level.warning, "Ranks will wait for each other: OMP_NUM_THREADS=2")
    assert MemoryCheck().judge({**well, "free_gib": 0.5})[0].level is Level.warning
    [differs] = MemoryCheck().compare({"a": well, "b": {**well, "cpus": 4}})
    assert differs.what == "number of processors differs: 8 on a; 4 on b"


@pytest.mark.parametrize(
    ("found", "level", "word"),
    [
        ({"memlock": None, "nofile": 65536, "nproc": None, "rdma": True}, Level.ok, "memlock unlimited"),
        ({"memlock": 65536, "nofile": 65536, "nproc": None, "rdma": False}, Level.ok, "memlock 65536"),
        ({"memlock": 65536, "nofile": 65536, "nproc": None, "rdma": True}, Level.failure, "65,536 bytes"),
        ({"memlock": None, "nofile": 1024, "nproc": None, "rdma": False}, Level.warning, "nofile is 1,024"),
        ({"memlock": None, "nofile": 65536, "nproc": 100, "rdma": False}, Level.warning, "nproc is 100"),
    ],
)
def test_limits(found: dict[str, Any], level: Level, word: str) -> None:
    [finding] = LimitsCheck().judge(found)
    assert finding.level is level
    assert word in finding.what
    assert LimitsCheck().judge(LimitsCheck().look(ASKED))


def test_shared_memory_of_a_container_by_default_is_too_small(tmp_path: Path) -> None:
    assert SharedMemoryCheck().judge({"total_gib": 0.0625, "free_gib": 0.0625})[0].level is Level.warning
    assert SharedMemoryCheck().judge({"total_gib": 16.0, "free_gib": 0.1})[0].level is Level.warning
    assert SharedMemoryCheck().judge({"total_gib": 16.0, "free_gib": 16.0})[0].level is Level.ok
    check = SharedMemoryCheck()
    check.folder = tmp_path / "absent"  # type: ignore[misc]
    assert check.look(ASKED)["total_gib"] == 0.0


# Disks.


def test_disk_measures_and_leaves_nothing(tmp_path: Path) -> None:
    check = DiskCheck()
    check.most_bytes, check.most_s = 2**23, 0.5
    folder = tmp_path / "not" / "yet"
    [found] = check.look(Asked(host="a", hosts=("a",), folders=(folder,)))
    assert found["mib_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    [finding] = check.judge([found])
    assert str(folder) in finding.what
    assert "written at" in finding.what


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        ({}, Level.ok, "written at 500 MiB/s"),
        ({"mib_per_s": 20.0}, Level.warning, "20 MiB/s"),
        ({"free_gib": 1.0}, Level.warning, "1.0 of 100.0 GiB"),
        ({"free_gib": 0.1, "mib_per_s": None}, Level.failure, "too little"),
        ({"error": "Read-only file system"}, Level.failure, "Read-only file system"),
    ],
)
def test_disk_verdicts(change: dict[str, Any], level: Level, word: str) -> None:
    found = {"folder": "/f", "total_gib": 100.0, "free_gib": 50.0, "mib_per_s": 500.0, "error": None}
    [finding] = DiskCheck().judge([{**found, **change}])
    assert finding.level is level
    assert word in finding.what


def test_disk_that_is_nearly_full_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, used=0, free=2**20))
    [found] = DiskCheck().look(Asked(host="a", hosts=("a",), folders=(tmp_path,)))
    assert found["mib_per_s"] is None


# Names and interfaces.


def test_names_that_lead_nowhere_or_are_slow_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, *_: Any, **__: Any) -> list[Any]:
        if name == "lost":
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = NamesCheck().look(Asked(host="me", hosts=("me", "lost", "there")))
    assert set(found) == {"lost", "there"}
    [warning] = NamesCheck().judge(found)
    assert warning.what == "lost: Name or service not known"
    [slow] = NamesCheck().judge({"there": 2.5})
    assert (slow.level, slow.what) == (Level.warning, "there takes 2.5 s")
    assert NamesCheck().judge({"there": 0.02})[0].what == "1 found, in 20 ms at most"
    assert NamesCheck().judge(NamesCheck().look(Asked(host="me", hosts=("me",)))) == []


NET = {
    "interfaces": {
        "lo": {"addresses": ["127.0.0.1"], "up": True, "mtu": 65536, "mbit_per_s": None},
        "eth0": {"addresses": ["10.0.0.5"], "up": True, "mtu": 9001, "mbit_per_s": 25000},
    },
    "gloo": None,
    "nccl": None,
    "named": ["10.0.0.5"],
    "route": "10.0.0.5",
    "hosts": 2,
}


@pytest.mark.parametrize(
    ("change", "level", "what", "advice"),
    [
        ({}, Level.ok, "eth0: 10.0.0.5, MTU 9,001, 25,000 Mbit/s", ""),
        ({"named": ["127.0.1.1"]}, Level.failure, "127.0.1.1, which is what Gloo tells", "backend.interface=eth0"),
        ({"named": ["127.0.1.1"], "hosts": 1}, Level.ok, "eth0", ""),
        ({"named": ["127.0.1.1"], "gloo": "eth0"}, Level.ok, "GLOO_SOCKET_IFNAME=eth0", ""),
        ({"named": []}, Level.failure, "leads nowhere", "backend.interface=eth0"),
        ({"gloo": "ens5"}, Level.failure, "GLOO_SOCKET_IFNAME=ens5, and there are eth0, lo", "backend.interface"),
        ({"nccl": "ib"}, Level.failure, "NCCL_SOCKET_IFNAME=ib", "backend.interface"),
        ({"nccl": "^docker,lo"}, Level.ok, "NCCL_SOCKET_IFNAME=^docker,lo", ""),
        ({"nccl": "eth"}, Level.ok, "NCCL_SOCKET_IFNAME=eth", ""),
    ],
)
def test_interface(change: dict[str, Any], level: Level, what: str, advice: str) -> None:
    [finding] = InterfacesCheck().judge({**NET, **change})
    assert finding.level is level
    assert what in finding.what
    assert advice in finding.advice


def test_interface_of_this_machine_and_what_differs() -> None:
    found = InterfacesCheck().look(Asked(host="a", hosts=("a",), meeting=("127.0.0.1", 29500)))
    assert found["route"] == "127.0.0.1"
    assert InterfacesCheck().judge(found)[0].level is Level.ok
    small = {**NET, "interfaces": {**NET["interfaces"], "eth0": {**NET["interfaces"]["eth0"], "mtu": 1500}}}  # type: ignore[dict-item,index]
    [finding] = InterfacesCheck().compare({"a": NET, "b": small})
    assert finding.what == "MTU differs: 9001 on a; 1500 on b"


# GPUs. The stand-in answers as driver 570 on two H100 does, and knows no clocks_event_reasons where it is told so.

SMI = r"""
case "$1" in
  --query-gpu=index,*) echo "0, NVIDIA H100 80GB HBM3, GPU-0, 570.133.20, 81559, 4, 34, 70.12, 700.00, P0"
                       echo "1, NVIDIA H100 80GB HBM3, GPU-1, 570.133.20, 81559, 4, 91, 71.00, 700.00, P0" ;;
  --query-gpu=ecc*) echo "0, 0"; echo "3, 12" ;;
  --query-gpu=retired*) echo "[N/A], [N/A], [N/A]"; echo "[N/A], [N/A], [N/A]" ;;
  --query-gpu=pcie*) echo "16, 16"; echo "8, 16" ;;
  --query-gpu=power*) echo "700.00"; echo "1000.00" ;;
  --query-gpu=clocks_event*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field to query.'; exit 2 ;;
  --query-gpu=clocks_throttle*) echo "Not Active, Not Active, Not Active, Not Active"
                                echo "Active, Active, Not Active, Not Active" ;;
  --query-remapped-rows*) echo "No, No"; echo "Yes, No" ;;
esac
"""


def test_gpus_by_a_stand_in_for_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "nvidia-smi", SMI, monkeypatch)
    stand_in(tmp_path, "dmesg", "echo '[1.2] NVRM: Xid (PCI:0000:b9:00): 79, pid=1, GPU has fallen off'", monkeypatch)
    found = GPUsCheck().look(Asked(host="a", hosts=("a",), instance_type="p5.48xlarge"))
    assert [gpu["temperature.gpu"] for gpu in found["gpus"]] == ["34", "91"]
    texts = {finding.what: finding.level for finding in GPUsCheck().judge(found)}
    assert texts == {
        "2 of the 8 H100 that p5.48xlarge has": Level.failure,
        "GPU 1: 3 memory errors that ECC could not correct": Level.failure,
        "GPU 1: memory waits to be retired": Level.warning,
        "GPU 1: slowed down by its own hardware (hw_slowdown)": Level.failure,
        "GPU 1: slowed down by heat (hw_thermal_slowdown)": Level.failure,
        "GPU 1: 91 °C": Level.warning,
        "GPU 1: held to 700 of 1000 W": Level.warning,
        "GPU 1: 8 of 16 PCIe lanes": Level.failure,
        "Xid 79 of PCI:0000:b9:00 in the kernel's log": Level.failure,
    }
    well = {**found, "gpus": found["gpus"][:1], "type": None, "xids": []}
    assert GPUsCheck().judge(well)[0].what == "1 NVIDIA H100 80GB HBM3, 34 °C, healthy"
    [kind] = GPUsCheck().compare({"a": well, "b": {**well, "gpus": found["gpus"]}})
    assert kind.what == "their number differs: 1 on a; 2 on b"


def test_gpus_where_nvidia_smi_fails_or_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        tmp_path,
        "nvidia-smi",
        "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
        monkeypatch,
    )
    with pytest.raises(RuntimeError, match=r"ends with 18: Failed to initialize NVML"):
        GPUsCheck().look(ASKED)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    found = GPUsCheck().look(ASKED)
    assert GPUsCheck().judge(found) == []
    [finding] = GPUsCheck().judge({**found, "type": "g5.48xlarge"})
    assert (finding.level, finding.what) == (Level.failure, "no nvidia-smi, and g5.48xlarge has 8 A10G")


def test_troubles_of_a_gpu_without_numbers_are_none() -> None:
    assert troubles(dict.fromkeys(("index", "temperature.gpu", "ecc.errors.uncorrected.volatile.total"), "[N/A]")) == []


def test_xids_are_found_once_each() -> None:
    log = "x\n[1] NVRM: Xid (PCI:0000:b9:00): 13, a\n[2] NVRM: Xid (PCI:0000:b9:00): 13, b\n[3] nvme: fine\n"
    assert xids(log) == [(13, "PCI:0000:b9:00")]
    [finding] = GPUsCheck().judge({"gpus": [], "type": None, "xids": [[31, "PCI:0000:b9:00"]]})
    assert finding.level is Level.warning


# EFA.


def sysfs(folder: Path, number: int, **counts: int) -> Path:
    """A tree as the kernel makes it for EFA devices and one of another maker."""
    for name, vendor in [*((f"rdmap{each}s0", "0x1d0f") for each in range(number)), ("mlx5_0", "0x15b3")]:
        (folder / name / "device").mkdir(parents=True, exist_ok=True)
        (folder / name / "device" / "vendor").write_text(f"{vendor}\n")
        (folder / name / "ports" / "1" / "hw_counters").mkdir(parents=True, exist_ok=True)
        for counter, value in counts.items():
            (folder / name / "ports" / "1" / "hw_counters" / counter).write_text(f"{value}\n")
    return folder


def test_efa_devices_and_counters_are_read(tmp_path: Path) -> None:
    tree = sysfs(tmp_path / "infiniband", 2, tx_bytes=100, rx_drops=0, lifespan=12)
    assert devices(tree) == ["rdmap0s0", "rdmap1s0"]
    assert devices(tmp_path / "absent") == []
    before = counters(tree, tmp_path / "net")
    assert before["efa.tx_bytes"] == 200
    sysfs(tree, 2, tx_bytes=1100, rx_drops=3)
    assert differences(before, counters(tree, tmp_path / "net")) == {"efa.tx_bytes": 2000, "efa.rx_drops": 6}


def test_counters_of_interfaces_without_loopback(tmp_path: Path) -> None:
    for name in ("lo", "eth0"):
        (tmp_path / name / "statistics").mkdir(parents=True)
        (tmp_path / name / "statistics" / "rx_errors").write_text("4\n")
    assert counters(tmp_path / "absent", tmp_path) == {"net.eth0.rx_errors": 4}


def test_judge_counters_says_whether_data_went_through_efa() -> None:
    counted = {"a": {"efa.tx_bytes": 5000, "efa.rx_drops": 2}, "b": {"net.eth0.rx_errors": 1, "net.eth0.rx_dropped": 9}}
    lost, passed, errors, tcp = judge_counters(counted, must_carry=True)
    assert (lost.level, lost.where) == (Level.warning, ("a",))
    assert "efa.rx_drops 2" in lost.what
    assert (passed.level, passed.what) == (Level.ok, "5,000 bytes went through EFA")
    assert "net.eth0.rx_errors 1" in errors.what
    assert (tcp.level, tcp.where) == (Level.failure, ("b",))
    assert judge_counters({"a": {}, "b": {}}, must_carry=False) == []


GOOD = {
    "libfabric": "1.22", "offered": 1, "no_devices": "", "plugin": "1.16.3", "no_plugin": "", "installer": "1.43",
    "gpus": True,
}  # fmt: skip
NO_DEVICES = "fi_info -p efa finds no EFA device (exit code 61, libfabric 1.17.0). Take an instance type with EFA"
NO_PLUGIN = "NCCL's plugin for libfabric can't be loaded: libnccl-net.so. Install aws-ofi-nccl"


@pytest.mark.parametrize(
    ("number", "kind", "change", "levels", "word"),
    [
        (32, "p5.48xlarge", {}, [Level.ok], "32 devices, libfabric 1.22, provider efa, aws-ofi-nccl 1.16.3"),
        (31, "p5.48xlarge", {}, [Level.warning], "31 of the 32"),
        (0, "p5.48xlarge", {}, [Level.failure], "none, and p5.48xlarge can have 32"),
        (0, None, {}, [], ""),
        (0, "g5.xlarge", {}, [], ""),
        (4, None, {"no_devices": NO_DEVICES}, [Level.failure], "libfabric has none: fi_info -p efa finds no EFA"),
        (4, None, {"no_plugin": NO_PLUGIN}, [Level.failure], "no plugin for NCCL: NCCL's plugin for"),
        (4, None, {"no_plugin": NO_PLUGIN, "gpus": False, "plugin": None}, [Level.ok], "provider efa"),
    ],
)
def test_efa_against_the_instance_type(
    number: int, kind: str | None, change: dict[str, Any], levels: list[Level], word: str
) -> None:
    found = {"devices": [f"rdmap{each}s0" for each in range(number)], "type": kind, **GOOD, **change}
    findings = EFACheck().judge(found)
    assert [finding.level for finding in findings] == levels
    assert all(word in finding.what for finding in findings)


def test_efa_asks_debians_fi_info_where_the_kernel_has_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'if [ "$1" = --version ]; then echo "libfabric: 1.17.0"; else echo "fi_getinfo: -61" >&2; exit 61; fi'
    stand_in(tmp_path / "bin", "fi_info", script, monkeypatch)
    monkeypatch.setattr("trainer.doctor.efa.devices", lambda: ["rdmap0s0"])
    found = EFACheck().look(ASKED)
    finding, *_ = EFACheck().judge(found)
    assert (found["libfabric"], finding.level) == ("1.17.0", Level.failure)
    assert "exit code 61" in finding.what
    monkeypatch.setattr("trainer.doctor.efa.devices", list)
    assert EFACheck().judge(EFACheck().look(ASKED)) == []


def test_efa_that_differs_between_hosts() -> None:
    full, half = ({"devices": ["x"] * number, "type": None, **GOOD} for number in (4, 2))
    [finding] = EFACheck().compare({"a": full, "b": half, "c": full})
    assert (finding.level, finding.what) == (Level.failure, "the number of devices differs: 2 on b; 4 on a, c")


# NCCL's own words, as logs of 2.28.3 with aws-ofi-nccl on EFA and on TCP have them.

OVER_EFA = """\
algo-1:7614:7614 [0] NCCL INFO NCCL version 2.28.3+cuda12.9
algo-1:7614:7691 [0] NCCL INFO NET/Plugin: Loaded net plugin AWS Libfabric (v6)
algo-1:7614:7691 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.16.3
algo-1:7614:7691 [0] NCCL INFO NET/OFI Using Libfabric version 1.22
algo-1:7614:7691 [0] NCCL INFO NET/OFI Selected Provider is efa (found 32 nics)
algo-1:7614:7691 [0] NCCL INFO PROFILER/Plugin: Could not find: libnccl-profiler.so.
algo-1:7614:7691 [0] NCCL INFO Using network AWS Libfabric
algo-1:7614:7700 [3] NCCL INFO Channel 00/0 : 3[3] -> 14[6] [send] via NET/Libfabric/3/GDRDMA
"""
NEWER = """\
algo-1:1:1 [6] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 15 nics)
algo-1:1:1 [6] NCCL INFO Using network Libfabric
"""
OVER_TCP = """\
algo-1:1:1 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so. Using internal network plugin.
algo-1:1:1 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.5<0>
algo-1:1:1 [0] NCCL INFO Using network Socket
"""


def test_read_log_of_nccl() -> None:
    efa = read_log(OVER_EFA)
    assert (efa.name, efa.plugin, efa.provider, efa.nics) == ("AWS Libfabric", "1.16.3", "efa", 32)
    assert (efa.version, efa.direct, efa.by_libfabric) == ("2.28.3+cuda12.9", True, True)
    newer = read_log(NEWER)
    assert (newer.name, newer.provider, newer.nics) == ("Libfabric", "efa", 15)
    tcp = read_log(OVER_TCP)
    assert (tcp.name, tcp.plugin, tcp.by_libfabric) == ("Socket", None, False)
    assert read_log("net.cc:626 NCCL WARN Error: network AWS Libfabric not found.\n").warnings == (
        "Error: network AWS Libfabric not found.",
    )


@pytest.mark.parametrize(
    ("text", "efa", "hosts", "level", "what"),
    [
        (OVER_EFA, True, 2, Level.ok, "network AWS Libfabric, aws-ofi-nccl 1.16.3, provider efa on 32 cards"),
        (OVER_TCP, True, 2, Level.failure, "network Socket, though there is EFA"),
        (OVER_TCP, True, 1, Level.warning, "network Socket, though there is EFA"),
        (OVER_TCP, False, 2, Level.ok, "network Socket"),
        (OVER_EFA.replace("is efa", "is tcp"), True, 2, Level.failure, "provider tcp"),
        ("", True, 2, Level.warning, "doesn't say"),
    ],
)
def test_judge_network_names_a_silent_fall_back(text: str, efa: bool, hosts: int, level: Level, what: str) -> None:
    [finding] = judge_network({"text": text, "why_not": None}, efa=efa, hosts=hosts)
    assert finding.level is level
    assert what in finding.what


def test_listening_puts_the_environment_back_and_leaves_what_is_set_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"):
        monkeypatch.delenv(name, raising=False)
    listening = Listening()
    with listening.open():
        Path(os.environ["NCCL_DEBUG_FILE"]).write_text(OVER_TCP)
    assert listening.text == OVER_TCP
    assert not {"NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"} & set(os.environ)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with listening.open():
        assert "NCCL_DEBUG_FILE" not in os.environ
    [finding] = judge_network({"text": "", "why_not": listening.why_not}, efa=True, hosts=2)
    assert "NCCL_DEBUG set outside" in finding.what


# Instance types.


def test_instances_say_where_their_numbers_come_from() -> None:
    for row in instances().values():
        assert row.source, row
        assert (row.gpus == 0) == (row.gpu == "")
        assert row.network_gbps is None or row.network_gbps > 0
    assert instances()["p5en.48xlarge"].efa == 16
    assert {"p4d.24xlarge", "p5.48xlarge", "trn1.32xlarge"} <= set(instances())


def test_given_instance_type() -> None:
    assert given("ml.P5.48xlarge") == "p5.48xlarge"
    with pytest.raises(ConfigError, match=r"p5.48xlarg\b.*Nearest: p5.*--instance-type"):
        given("p5.48xlarg")


def test_detected_instance_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.ec2.instance_type", lambda: None)
    monkeypatch.setattr("trainer.doctor.instances._SAGEMAKER", tmp_path / "resourceconfig.json")
    assert detected() is None
    (tmp_path / "resourceconfig.json").write_text('{"current_instance_type": "ml.g5.xlarge"}')
    assert detected() == "g5.xlarge"
    (tmp_path / "resourceconfig.json").write_text("{")
    assert detected() is None
    monkeypatch.setattr("strategies.ec2.instance_type", lambda: "p5.48xlarge")
    assert detected() == "p5.48xlarge"
