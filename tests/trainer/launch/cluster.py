"""A cluster in a folder: the stand-in for kubectl that the tests put on PATH, and what a kubelet does with a container.

As a program it answers like kubectl from files of the folder that SHARDWRIGHT_TEST_CLUSTER names: `job.json` and
`pods.json` as the cluster describes them, `log` of the first pod, `fails` with what every call ends with. What it was
asked lies in `asked`, what it was given in `applied.yaml`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAMP = "2026-11-22T09:00:{:02d}.{:09d}Z"


class Cluster:
    """What a test says of the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, where: Path) -> None:
        """Put the stand-in into a folder of PATH."""
        program = where / "kubectl"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__)} "$@"\n')
        program.chmod(0o755)

    def describe(self, *conditions: str, pods: list[dict[str, Any]] | None = None, message: str = "") -> None:
        """The job with conditions that hold, and its pods."""
        status = {"conditions": [{"type": each, "status": "True", "message": message} for each in conditions]}
        (self.folder / "job.json").write_text(json.dumps({"metadata": {"name": "job"}, "status": status}))
        if pods is not None:
            (self.folder / "pods.json").write_text(json.dumps({"items": pods}))

    def log(self, *lines: str) -> None:
        """What the first pod has printed, with a time before each line."""
        stamped = [f"{STAMP.format(number, 0)} {line}\n" for number, line in enumerate(lines)]
        (self.folder / "log").write_text("".join(stamped))

    def fail(self, said: str) -> None:
        """Let each call end so."""
        (self.folder / "fails").write_text(said)

    @property
    def applied(self) -> str:
        """The manifest that came last."""
        return (self.folder / "applied.yaml").read_text()

    @property
    def asked(self) -> list[list[str]]:
        """The words of each call."""
        path = self.folder / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pod(name: str, phase: str, code: int | None = None, **more: Any) -> dict[str, Any]:
    """A pod as the cluster describes it."""
    state = {} if code is None else {"terminated": {"exitCode": code}}
    container = {"name": "pytorch", "state": state, "restartCount": 0, **more}
    return {"metadata": {"name": name, "labels": {}}, "status": {"phase": phase, "containerStatuses": [container]}}


def expanded(word: str, variables: Mapping[str, str]) -> str:
    """What a kubelet makes of a word of `command` and `args`: $(NAME) is replaced where it is known, $$ is one $."""

    def put(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", put, word)


def command_of(container: Mapping[str, Any], operator: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Words and variables with which a kubelet starts a container.

    Args:
        container: of a manifest.
        operator: what its operator adds to the variables.
    """
    variables = dict(operator) | {each["name"]: each["value"] for each in container["env"] if "value" in each}
    return [expanded(word, variables) for word in (*container["command"], *container["args"])], variables


def _answer(folder: Path, words: list[str]) -> int:
    verb, *rest = [word for word in words if not word.startswith(("--context", "--namespace"))]
    with (folder / "asked").open("a") as file:
        file.write(json.dumps(words) + "\n")
    if (fails := folder / "fails").is_file():
        sys.stderr.write(fails.read_text() + "\n")
        return 1
    if verb == "apply":
        (folder / "applied.yaml").write_text(sys.stdin.read())
    elif verb == "delete":
        for name in ("job.json", "pods.json"):
            (folder / name).unlink(missing_ok=True)
    elif verb == "logs":
        with_time = "--timestamps" in rest
        for line in (folder / "log").read_text().splitlines():
            sys.stdout.write((line if with_time else line.partition(" ")[2]) + "\n")
    elif verb == "get" and rest[0] == "pods":
        path = folder / "pods.json"
        sys.stdout.write(path.read_text() if path.is_file() else '{"items": []}')
    elif verb == "get" and "/" in rest[0]:
        path = folder / "job.json"
        if not path.is_file():
            sys.stderr.write(f'Error from server (NotFound): {rest[0].partition("/")[0]} "x" not found\n')
            return 1
        sys.stdout.write(path.read_text())
    elif verb == "get":
        path = folder / "others.json"
        sys.stdout.write(path.read_text() if path.is_file() else '{"items": []}')
    return 0


if __name__ == "__main__":
    sys.exit(_answer(Path(os.environ["SHARDWRIGHT_TEST_CLUSTER"]), sys.argv[1:]))
