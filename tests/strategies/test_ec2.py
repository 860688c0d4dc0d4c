"""What is found on a machine, made of stand-ins, and with libfabric's own program where it is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from strategies import ec2
from strategies.ec2 import look
from tests.strategies.efa_standins import StandIn, write_plugin


def test_look_finds_versions_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = StandIn().install(tmp_path, monkeypatch)
    (tmp_path / "amazon").mkdir()
    (tmp_path / "amazon/efa_installed_packages").write_text("# EFA installer version: 1.50.0\nefa-config-1.18-1\n")
    machine = look(variables)
    assert (machine.libfabric, machine.plugin, machine.nccl) == ("2.6.0amzn1.0", "1.21.1", "2.29.7")
    assert (machine.instance, machine.kernel, machine.installer) == ("p5.48xlarge", "6.8.0-1050-aws", "1.50.0")
    assert machine.devices == ("rdmap79s0", "rdmap80s0")
    assert machine.plugin_path == tmp_path / "lib/libnccl-net.so"
    assert (machine.no_devices, machine.no_plugin, machine.plugin_word) == ("", "", None)
    assert machine.describe().startswith("2 devices on p5.48xlarge, libfabric 2.6.0amzn1.0, aws-ofi-nccl 1.21.1 (")


def test_look_prefers_the_program_of_awss_installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = StandIn(libfabric="1.17.0", devices=()).install(tmp_path / "debian", monkeypatch)
    monkeypatch.setattr(ec2, "INSTALLED", tmp_path / "amazon")
    StandIn().build(tmp_path / "amazon/efa")
    assert look(variables).libfabric == "2.6.0amzn1.0"


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (
            StandIn(devices=(), libfabric="1.17.0"),
            "no EFA device (exit code 61, libfabric 1.17.0). Take an instance",
        ),
        (StandIn(libfabric=None), "fi_info is neither in"),
    ],
)
def test_look_without_devices_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: StandIn, expected: str
) -> None:
    found = look(machine.install(tmp_path, monkeypatch))
    assert found.devices == ()
    assert expected in found.no_devices


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo broken >&2; exit 127", "ends with 127: broken"),
        ("exit 0", "it names no device"),
        ("kill -ABRT $$", "ends with -6"),
    ],
)
def test_look_with_a_broken_fi_info_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    variables = StandIn().install(tmp_path, monkeypatch)
    (tmp_path / "bin/fi_info").write_text(f"#!/bin/sh\n{script}\n")
    assert expected in look(variables).no_devices


def test_look_with_a_silent_fi_info_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = StandIn().install(tmp_path, monkeypatch)
    monkeypatch.setattr(ec2, "_LONGEST_S", 0.2)
    (tmp_path / "bin/fi_info").write_text("#!/bin/sh\nexec sleep 5\n")
    found = look(variables)
    assert "doesn't answer" in found.no_devices
    assert found.plugin == "1.21.1" or "timed out" in found.no_plugin  # 0.2 s is short for a busy machine


@pytest.mark.parametrize("name", ["FI_PROVIDER", "FI_EFA_MTU_SIZE"])
def test_look_isnt_misled_by_what_filters_or_aborts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables = StandIn().install(tmp_path, monkeypatch)
    assert len(look({**variables, name: "tcp"}).devices) == 2


@pytest.mark.parametrize(("given", "file"), [("{lib}/mine.so", "mine.so"), ("libnccl-net-a.so", "libnccl-net-a.so"),
                                             ("a", "libnccl-net-a.so"), ("none,a", "libnccl-net-a.so")])  # fmt: skip
def test_look_takes_the_plugin_that_nccl_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, file: str
) -> None:
    variables = StandIn(plugin=None).install(tmp_path, monkeypatch)
    path = tmp_path / "lib" / file.replace("mine", "libnccl-mine")
    write_plugin(path, "1.14.2")
    found = look({**variables, "NCCL_NET_PLUGIN": given.format(lib=path.parent).replace("mine.so", "libnccl-mine.so")})
    assert (found.plugin, found.plugin_path) == ("1.14.2", path)


def test_look_in_nvidias_container_says_what_to_call_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(StandIn(file="libnccl-net-ofi.so").install(tmp_path, monkeypatch))
    assert (found.plugin, found.plugin_word, found.no_plugin) == ("1.21.1", "ofi", "")


def test_look_without_a_plugin_gives_the_loaders_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = StandIn(plugin=None).install(tmp_path, monkeypatch)
    found = look(variables)
    assert "libnccl-net.so: cannot open shared object file" in found.no_plugin
    assert "Install aws-ofi-nccl" in found.no_plugin
    (tmp_path / "lib" / ec2.PLUGIN).write_text("text")
    assert "file too short" in look(variables).no_plugin
    for name in ("none", ","):
        assert "NCCL's plugin" in look({**variables, "NCCL_NET_PLUGIN": name}).no_plugin


def test_look_with_a_plugin_off_the_loaders_path_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = StandIn(plugin=None).install(tmp_path, monkeypatch)
    folder = tmp_path / "amazon/ofi-nccl/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    write_plugin(folder / ec2.PLUGIN, "1.21.1")
    found = look(variables)
    assert f"Put {folder} into LD_LIBRARY_PATH" in found.no_plugin
    assert look({**variables, "LD_LIBRARY_PATH": str(folder)}).plugin == "1.21.1"


def test_look_with_a_plugin_that_hides_its_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = StandIn(plugin="GitHub-dev").install(tmp_path, monkeypatch)
    found = look(variables)
    assert (found.plugin, found.no_plugin) == (None, "")
    assert found.plugin_path is not None


@pytest.mark.skipif(shutil.which("fi_info") is None, reason="fi_info isn't installed (apt-get install libfabric-bin)")
@pytest.mark.skipif(Path("/dev/infiniband").exists(), reason="this machine has such devices")
def test_look_with_debians_fi_info_finds_no_device() -> None:
    found = look()
    assert found.libfabric is not None
    assert f"finds no EFA device (exit code 61, libfabric {found.libfabric})" in found.no_devices
