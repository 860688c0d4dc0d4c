"""What leaves the checkout: the wheel, its metadata, and the lock that the README's commands install."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("conf", "scripts", "strategies", "trainer")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, so that the checkout gets no build folders."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source],
        check=True,
        capture_output=True,
        cwd=target,
    )
    (built,) = target.glob("shardwright-*.whl")
    return built


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files where an installer would put them."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def metadata(unpacked: Path) -> Message:
    (info,) = unpacked.glob("*.dist-info")
    return Parser().parsestr((info / "METADATA").read_text())


def _requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def _pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_package_holds_the_files_of_the_checkout(unpacked: Path, package: str) -> None:
    kinds = ("*.py", "*.yaml", "*.yml", "*.csv", "*.html", "*.css", "*.js", "*.fasta", "start.sh", "py.typed")
    ours = {path.relative_to(ROOT) for kind in kinds for path in (ROOT / package).rglob(kind)}
    shipped = {path.relative_to(unpacked) for kind in kinds for path in (unpacked / package).rglob(kind)}
    assert ours
    assert shipped == ours


@pytest.mark.parametrize("package", ["strategies", "trainer"])
def test_wheel_says_that_it_is_typed(unpacked: Path, package: str) -> None:
    assert (unpacked / package / "py.typed").is_file()


def test_wheel_has_no_other_top_level_name(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == set(PACKAGES)


def test_installed_trainer_finds_conf_beside_it(unpacked: Path, tmp_path: Path) -> None:
    code = "import importlib.util, json; print(json.dumps(importlib.util.find_spec('trainer').origin))"
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path, env={"PYTHONPATH": str(unpacked)}
    )
    conf = Path(json.loads(answer.stdout)).parent.parent / "conf"
    assert conf == unpacked / "conf"
    assert any(conf.rglob("*.yaml"))


def test_wheel_announces_the_command(unpacked: Path) -> None:
    (points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert points.read_text().split("\n")[:2] == ["[console_scripts]", "shardwright = trainer.cli:main"]


def test_wheel_offers_the_extras(metadata: Message) -> None:
    expected = {"aws", "deepspeed", "dev", "horovod", "loggers", "peft", "prometheus", "sweep", "torch"}
    assert expected <= set(metadata.get_all("Provides-Extra", []))


def test_wheel_leaves_the_torch_of_a_container_alone(metadata: Message) -> None:
    needed = [requirement for requirement in _requirements(metadata) if requirement.name == "torch"]
    assert [str(requirement.marker) for requirement in needed] == ['extra == "torch"']


@pytest.mark.parametrize(("package", "version"), [("torch", "2.9.0"), ("transformers", "5.3.0")])
def test_range_admits_the_training_container(metadata: Message, package: str, version: str) -> None:
    (requirement,) = (found for found in _requirements(metadata) if found.name == package)
    assert requirement.specifier.contains(version)


def test_lock_pins_each_package_within_the_stated_range(metadata: Message) -> None:
    pins = _pins()
    installed = [{"extra": extra} for extra in ("", "torch", "dev")]
    wanted = [
        requirement
        for requirement in _requirements(metadata)
        if requirement.marker is None or any(map(requirement.marker.evaluate, installed))
    ]
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pins
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_lock_names_no_build_of_torch() -> None:
    pins = _pins()
    assert "+" not in pins["torch"]
    assert [name for name in pins if name.startswith(("nvidia", "torch", "triton"))] == ["torch"]
