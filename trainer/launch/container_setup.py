"""In a container, before anything of ours can be imported: install what the image lacks, and leave its torch alone.

Run as a file; the first word is the failure file. Nothing of ours is imported, and syntax stays such
that an old Python can say that it is too old.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
OLDEST = (3, 11)
# What is built against the image's torch, CUDA and drivers: pip keeps these versions, or says that it can't.
KEPT = re.compile(
    r"torch|torchvision|torchaudio|torchtext|torchdata|triton|pytorch-triton|nvidia-.*|cuda-.*|numpy|horovod"
    r"|deepspeed|apex|flash-attn|transformer-engine|smdistributed.*|smdebug|sagemaker-.*|mpi4py"
)


def main(failure: Path) -> int:
    """Install; 0, or the exit code after the reason was written to `failure`."""
    if sys.version_info[:2] < OLDEST:
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return fail(failure, f"the image has Python {found}, 3.11 is needed", "Choose another (launcher.image).")
    lacking = []
    for line in (ROOT / "requirements.txt").read_text().split("\n"):
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if not name or fits(line):
            continue
        if name == "torch":
            reason = f"the image has torch {version(name) or '(none)'}, {line} is needed"
            return fail(failure, reason, "Choose another (launcher.image).")
        lacking.append(line)
    job = ROOT / "job-requirements.txt"
    wanted = [*lacking, *(["-r", str(job)] if job.is_file() else [])]
    if not wanted:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={found}\n" for name, found in kept().items()))
        sys.stdout.write(f"installing {' '.join(wanted)}\n")
        sys.stdout.flush()
        problem = installed([*wanted, "-c", str(constraints)])
    if problem is None:
        return 0
    return fail(failure, f"pip couldn't install what the image lacks: {problem}", "Read the log (launcher.image).")


def installed(wanted: list[str]) -> str | None:
    """Let pip install; None, or the line that says why it couldn't."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line.strip())
    if process.returncode == 0:
        return None
    told = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or [f"exit code {process.returncode}"]
    return told[0].removeprefix("ERROR:").strip().rstrip(".")


def fits(line: str) -> bool:
    """Whether the image has what a requirement asks for."""
    requirements = _requirements()
    need = requirements.Requirement(line)
    found = version(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def _requirements() -> Any:
    try:
        from packaging import requirements
    except ImportError:  # pip brings its own
        from pip._vendor.packaging import requirements  # type: ignore[no-redef]
    return requirements


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def kept() -> dict[str, str]:
    """Packages whose versions stay."""
    names = {str(each.metadata["Name"]).lower().replace("_", "-"): each.version for each in metadata.distributions()}
    return {name: found for name, found in sorted(names.items()) if KEPT.fullmatch(name)}


def fail(failure: Path, reason: str, fix: str) -> int:
    """SageMaker shows the beginning of the file."""
    line = f"ConfigError: SageMaker: {reason}. {fix}"
    failure.parent.mkdir(parents=True, exist_ok=True)
    if not failure.exists() or not failure.stat().st_size:
        failure.write_text(line + "\n")
    sys.stderr.write(line + "\n")
    return 2


if __name__ == "__main__":
    os.environ.setdefault("PIP_ROOT_USER_ACTION", "ignore")
    sys.exit(main(Path(sys.argv[1])))
