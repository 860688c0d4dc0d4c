"""Stand-ins for Slurm's programs: they note how they were called, and answer what a test has laid out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

_SBATCH = """
cat > "$lab/script"
printf '%s\\n' "$@" > "$lab/options"
env > "$lab/environment"
if [ -e "$lab/refuses" ]; then cat "$lab/refuses" >&2; exit 1; fi
echo "${number:-101}"
"""
_SCONTROL = """
echo "scontrol $*" >> "$lab/calls"
case "$*" in *"show job"*)
    if [ -e "$lab/silent" ]; then echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; fi
    first=$(ls "$lab/answers" | head -n 1)
    if [ -z "$first" ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
    cat "$lab/answers/$first"
    if [ "$(ls "$lab/answers" | wc -l)" -gt 1 ]; then rm "$lab/answers/$first"; fi
esac
"""
_SCANCEL = """
echo "scancel $*" >> "$lab/calls"
"""
# As srun, on one machine: every process gets its variables, a SIGUSR1 goes to all, and the first that fails ends the
# others at once.
_SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys, time
words = sys.argv[1:]
first = next(i for i, word in enumerate(words) if not word.startswith("--"))
if words[first:] == ["true"]:
    sys.exit(os.path.exists(os.path.join(os.environ["LAB"], "gone")))
size = int(os.environ["LAB_TASKS"])
open(os.path.join(os.environ["LAB"], "srun"), "w").write("\\n".join(words[:first]))
tasks = []
for rank in range(size):
    told = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "RANK": "from a hook"}
    tasks.append(subprocess.Popen(words[first:], env={**os.environ, **told}, start_new_session=True))
signal.signal(signal.SIGUSR1, lambda number, frame: [os.killpg(task.pid, number) for task in tasks])
open(os.path.join(os.environ["LAB"], "step"), "w").close()
while None in (codes := [task.poll() for task in tasks]):
    if any(code not in (None, 0) for code in codes):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@dataclass(frozen=True)
class Programs:
    """Where they are, and what they were told."""

    folder: Path

    @property
    def calls(self) -> list[str]:
        """Of scontrol and scancel, those that only ask left out."""
        return [line for line in self._lines("calls") if "show job" not in line]

    @property
    def options(self) -> list[str]:
        """Of the last sbatch."""
        return self._lines("options")

    @property
    def script(self) -> str:
        """What the last sbatch read."""
        return (self.folder / "script").read_text()

    def answer(self, *answers: str) -> None:
        """What `scontrol show job` says, one after the other; the last one for good."""
        for path in (self.folder / "answers").iterdir():
            path.unlink()
        for number, answer in enumerate(answers):
            (self.folder / "answers" / f"{number:03}").write_text(f"{answer}\n")

    def refuse(self, text: str) -> None:
        """Let sbatch end with `text`."""
        (self.folder / "refuses").write_text(text)

    def silence_nodes(self, gone: bool) -> None:
        """Whether an srun of `true` fails, as it does where a node is gone."""
        (self.folder / "gone").unlink(missing_ok=True)
        if gone:
            (self.folder / "gone").touch()

    def add(self, name: str, text: str) -> None:
        """One more program."""
        head = "" if text.startswith("#!") else f"#!/bin/sh\nlab='{self.folder}'\n"
        path = self.folder / "bin" / name
        path.write_text(head + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    """Slurm's programs, first on PATH."""
    found = Programs(tmp_path / "slurm")
    for name in ("bin", "answers"):
        (found.folder / name).mkdir(parents=True)
    for name, text in (("sbatch", _SBATCH), ("scontrol", _SCONTROL), ("scancel", _SCANCEL), ("srun", _SRUN)):
        found.add(name, text)
    monkeypatch.setenv("PATH", f"{found.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LAB", str(found.folder))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return found


def described(state: str, number: str = "101", name: str = "mine", code: str = "0:0", **more: str) -> str:
    """A line of `scontrol --oneliner show job`."""
    reason = more.pop("Reason", "None")
    rest = "".join(f" {key}={value}" for key, value in more.items())
    return (
        f"JobId={number}{rest} JobName={name} UserId=me(1000) GroupId=me(1000) Priority=1 JobState={state} "
        f"Reason={reason} Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 ExitCode={code} RunTime=00:00:01 "
        "NodeList=n[1-2] Comment=JobState=FAILED"
    )


def lines_of(text: str, *words: str) -> Sequence[str]:
    """Those that hold one of `words`."""
    return [line for line in text.splitlines() if any(word in line for word in words)]
