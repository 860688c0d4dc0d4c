"""The code that a job takes along: the script's folder and this package, in an archive that never differs by itself."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement

from strategies.errors import ConfigError
from trainer.metrics.text import byte_size

ROOT = Path(__file__).resolve().parent.parent.parent
START = Path(__file__).resolve().parent / "start.sh"
OURS = "shardwright"
"""The folder of the archive that holds this package; the script's folder is the archive's root."""
REQUIREMENTS = f"{OURS}/requirements.txt"
JOB_REQUIREMENTS = f"{OURS}/job-requirements.txt"
_PACKAGES = ("trainer", "strategies", "conf", "scripts")
_MOST_BYTES = 200 * 2**20
_LEFT_OUT = {"__pycache__", "node_modules", "site-packages"}
_LEFT_OUT_AT_TOP = {"runs", "outputs", "multirun", "wandb", "mlruns", "lightning_logs"}
_SECRET = re.compile(
    r".*\.(pem|key|p12|pfx|keystore)|id_(rsa|dsa|ecdsa|ed25519).*|credentials(\.(json|csv|ya?ml|toml|ini|txt))?",
    re.IGNORECASE,
)
_OTHERS = re.compile(r".*(\.pyc|\.pyo|\.egg-info|\.swp|~)")


@dataclass(frozen=True)
class Code:
    """What is sent."""

    archive: bytes
    """A tar.gz."""
    start: bytes
    """The program that unpacks and starts it."""
    script: str
    """In the archive."""

    @property
    def digest(self) -> str:
        """Of everything that is sent."""
        return hashlib.sha256(self.archive + b"\0" + self.start).hexdigest()[:20]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the code comes from."""

    script: Path
    folder: Path | None = None
    """Goes along as a whole; None: the script's folder."""
    dependencies: Sequence[Path] = ()
    """Folders that go along beside the script, to be imported by their names."""
    requirements: Path | None = None
    """For pip; None: the folder's requirements.txt, if it has one."""


def pack(source: Source, *, for_toolkit: bool = False) -> Code:
    """Read everything and put it into one archive; the same files give the same bytes.

    Args:
        source: what goes along.
        for_toolkit: SageMaker's toolkit starts it, which installs a requirements.txt of the root by itself.

    Raises:
        ConfigError: something isn't there, is too big, or stands in the way of something else.
    """
    files: dict[str, Path] = {}
    for name in _PACKAGES:
        _add(files, f"{OURS}/{name}", ROOT / name, "the package", top=False)
    folder = (source.folder or source.script.parent).resolve()
    script = source.script.resolve()
    if source.folder is None and script.parent == ROOT / "scripts":
        inside = f"{OURS}/scripts/{script.name}"
    else:
        if not script.is_relative_to(folder):
            raise ConfigError(
                f"launch: the script {source.script} is not in {folder}. Name a folder that holds it (launcher.code)."
            )
        inside = script.relative_to(folder).as_posix()
        if (folder / OURS / "trainer").is_dir():
            raise ConfigError(
                f"launch: {folder} holds a folder {OURS}, where this package goes. Rename it (launcher.code)."
            )
        _add(files, "", folder, "launcher.code")
    for each in source.dependencies:
        name = each.resolve().name
        if any(path == name or path.startswith(f"{name}/") for path in files):
            raise ConfigError(f"launch: there are two folders {name}, one of them {each} (launcher.dependencies).")
        if not each.is_dir():
            raise ConfigError(f"launch: there is no folder {each} (launcher.dependencies).")
        _add(files, name, each.resolve(), "launcher.dependencies")
    if inside not in files:
        raise ConfigError(f"launch: {source.script} would be left out of what is sent. Rename it (--script).")
    # The toolkit's pip would replace a torch outside of the range; our own start refuses it.
    lines = [line for line in needs() if not (for_toolkit and re.match(r"torch\b", line))]
    texts = {REQUIREMENTS: "\n".join(lines) + "\n", **_job_requirements(files, source, for_toolkit)}
    return Code(archive=_archive(files, texts), start=START.read_bytes(), script=inside)


def needs() -> list[str]:
    """What this package takes from others, the range of torch among it."""
    found: list[str] = []
    project = ROOT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text()).get("project", {})
        if table.get("name") == OURS:
            found = [*table["dependencies"], *table["optional-dependencies"]["torch"]]
    if not found:
        try:
            lines = [Requirement(line) for line in requires(OURS) or []]
        except PackageNotFoundError as error:
            raise ConfigError(f"launch: {ROOT} is neither a checkout nor an installed package.") from error
        found = [
            f"{each.name}{each.specifier}"
            for each in lines
            if each.marker is None or (each.name == "torch" and each.marker.evaluate({"extra": "torch"}))
        ]
    return sorted(found)


def _job_requirements(files: dict[str, Path], source: Source, for_toolkit: bool) -> dict[str, str]:
    """Texts that lead pip to the user's requirements, whose own place in the archive keeps their includes right."""
    given = source.requirements
    if given is not None and not given.is_file():
        raise ConfigError(f"launch: there is no file {given} (launcher.requirements).")
    at = next((name for name, path in files.items() if given is not None and path == given.resolve()), None)
    if given is None and "requirements.txt" in files:
        at = "requirements.txt"
    if given is not None and at is None:
        at = "requirements-job.txt"
        files[at] = given.resolve()
    texts = {}
    if for_toolkit and "requirements.txt" in files:
        moved = files.pop("requirements.txt")
        if at == "requirements.txt":
            at = "requirements-job.txt"
            files[at] = moved
    if at is not None:
        texts[JOB_REQUIREMENTS] = f"-r ../{at}\n"
    if for_toolkit:
        lines = [f"-r {name}\n" for name in (REQUIREMENTS, JOB_REQUIREMENTS) if name == REQUIREMENTS or name in texts]
        texts["requirements.txt"] = "".join(lines)
    return texts


def _add(files: dict[str, Path], name: str, folder: Path, what: str, *, top: bool = True) -> None:
    """Put the files of `folder` under `name`; stops where it gets too big."""
    total = 0
    biggest: list[tuple[int, str]] = []
    for relative, path in _walk(folder, top=top):
        size = path.stat().st_size
        total += size
        biggest = sorted([*biggest, (size, relative)], reverse=True)[:3]
        if total > _MOST_BYTES:
            most = ", ".join(f"{each} ({byte_size(size)})" for size, each in biggest)
            raise ConfigError(
                f"launch: {folder} has more than {byte_size(_MOST_BYTES)} to send, such as {most}. Put data into a "
                f"channel (launcher.channels), or name a smaller folder ({what})."
            )
        files[f"{name}/{relative}" if name else relative] = path


def _walk(folder: Path, *, top: bool) -> Iterator[tuple[str, Path]]:
    """Relative names and files, without what nobody wants to send."""
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        base = Path(here)
        if (real := os.path.realpath(here)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        at_top = top and base == folder
        folders[:] = sorted(
            each
            for each in folders
            if not _left_out(each)
            and not (at_top and each in _LEFT_OUT_AT_TOP)
            and not (base / each / "pyvenv.cfg").exists()
        )
        for each in sorted(names):
            path = base / each
            if not _left_out(each) and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _left_out(name: str) -> bool:
    return (
        name.startswith(".")  # .git, .venv, .env, .aws, caches
        or name in _LEFT_OUT
        or _SECRET.fullmatch(name) is not None
        or _OTHERS.fullmatch(name) is not None
    )


def _archive(files: dict[str, Path], texts: dict[str, str]) -> bytes:
    held = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=held, mode="wb", mtime=0, compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(files.keys() | texts.keys()):
            content = texts[name].encode() if name in texts else _content(files[name])
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755 if name in files and os.access(files[name], os.X_OK) else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return held.getvalue()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"launch: {path} can't be read: {error.strerror}. Send another folder (launcher.code)."
        ) from error
