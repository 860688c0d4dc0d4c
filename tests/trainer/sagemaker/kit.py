"""A tree like /opt/ml, and SageMaker's own toolkit to start what is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent.parent
QUICK = {
    "data": "text", "data.length": 32, "trainer.max_steps": 4, "trainer.global_batch": 4, "trainer.eval_every": None,
    "trainer.log_every": 1, "hooks": [], "logger": [], "strategy": "ddp",
}  # fmt: skip
TEXT = {"train": {"a.txt": "To be, or not to be, that is the question. " * 60}}


@dataclass(kw_only=True)
class Container:
    """One training job's container on this machine."""

    base: Path
    program: str = "scripts/train.py"
    hosts: Sequence[str] = ("localhost",)
    host: str = "localhost"
    instance_type: str = "ml.c5.xlarge"
    interface: str = "lo"
    network: str | None = None
    """The network namespace that is this host's."""
    seen_at: Path | None = None
    """Where this host sees `base`; all hosts of a job see the same path. None: there."""
    channels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Contents of files, by channel and name."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def prepare(self, hyperparameters: Mapping[str, Any]) -> None:
        """Write what the service writes before a job starts; what is there of an earlier job stays.

        Args:
            hyperparameters: as JSON knows them; the service sends each as a text that holds JSON.
        """
        config = self.base / "input" / "config"
        code = self.base / "src"
        config.mkdir(parents=True, exist_ok=True)
        if not code.exists():
            for name in ("conf", "docs/examples", "scripts", "strategies", "trainer"):
                shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
        given = {
            "sagemaker_program": self.program,
            "sagemaker_submit_directory": str(self.seen / "src"),
            **hyperparameters,
        }
        sent = {name: json.dumps(value) for name, value in given.items()}
        (config / "hyperparameters.json").write_text(json.dumps(sent))
        resources = {
            "current_host": self.host, "hosts": list(self.hosts), "network_interface_name": self.interface,
            "current_instance_type": self.instance_type, "current_group_name": "all",
            "instance_groups": [
                {"instance_group_name": "all", "instance_type": self.instance_type, "hosts": list(self.hosts)}
            ],
        }  # fmt: skip
        (config / "resourceconfig.json").write_text(json.dumps(resources))
        (config / "inputdataconfig.json").write_text(json.dumps({name: {} for name in self.channels}))
        for name, files in self.channels.items():
            for file, text in files.items():
                path = self.base / "input" / "data" / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        (self.base / "checkpoints").mkdir(exist_ok=True)
        for left in ("failure", "success"):
            (self.base / "output" / left).unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """Nothing of this process's own launch; the programs of this environment."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SM_", "PYTEST_", "PYTHON")) and name not in ("RANK", "WORLD_SIZE")
        }
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "SAGEMAKER_BASE_DIR": str(self.seen),
            "OMP_NUM_THREADS": "1",
            **self.variables,
        }

    def toolkit(self, hyperparameters: Mapping[str, Any], timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Run the job as AWS's containers do."""
        return self._ended("toolkit", hyperparameters, timeout)

    def own(self, hyperparameters: Mapping[str, Any], timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Run the job by our own entry point, without a toolkit."""
        return self._ended("own", hyperparameters, timeout)

    def _ended(self, by: str, given: Mapping[str, Any], timeout: float) -> subprocess.CompletedProcess[str]:
        process = self.begin(by, given, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def begin(self, by: str, given: Mapping[str, Any], stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
        """Start the job, by `toolkit` or `own`."""
        self.prepare(given)
        words = [sys.executable, str(self.seen / "src" / "scripts" / "container.py")] if by == "own" else ["train"]
        if self.network is not None:
            there = ["sh", "-c", 'mount --bind "$0" "$1" && cd "$1" && shift && exec "$@"', str(self.base)]
            words = ["ip", "netns", "exec", self.network, *there, str(self.seen), *words]
        module = {"SAGEMAKER_TRAINING_MODULE": "sagemaker_pytorch_container.training:main"}
        return subprocess.Popen(
            words,
            env={**self.environment(), **(module if by == "toolkit" else {})},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=self.base,
        )

    @property
    def seen(self) -> Path:
        """`base`, as this host calls it."""
        return self.seen_at or self.base

    @property
    def failure(self) -> str:
        """What SageMaker would show."""
        path = self.base / "output" / "failure"
        return path.read_text() if path.exists() else ""

    def steps(self) -> list[int]:
        """Of the run's record."""
        record = self.base / "checkpoints" / "metrics.jsonl"
        return [json.loads(line)["step"] for line in record.read_text().splitlines()]
