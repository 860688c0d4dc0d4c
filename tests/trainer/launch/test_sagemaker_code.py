"""The code that a job takes along: what is in it, and that it runs from what was sent."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from strategies.errors import ConfigError
from tests.trainer.launch.service import Service, aws, service_process
from tests.trainer.launch.test_sagemaker_jobs import launch
from trainer.launch import sagemaker_code
from trainer.launch.sagemaker_code import JOB_REQUIREMENTS, REQUIREMENTS, ROOT, Code, Source, needs, pack

__all__ = ["aws", "service_process"]

SCRIPT = """
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import helpers
import torch
import trainer
from mylib.text import GREETING
from torch import nn

from strategies.base import Batch, LossTerms
from trainer import Trainer, run
from trainer.data import Data


@dataclass(kw_only=True)
class Mine(Trainer):
    note: str = ""
    nothing: int | None = 3
    widths: list[int] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def make_model(self):
        return nn.Linear(4, 2)

    def make_data(self):
        return Data(train=list(torch.randn(64, 4)), validation=[], description="noise")

    def collate(self, samples, seeds):
        labels = torch.zeros(len(samples), dtype=torch.long)
        return Batch(inputs={"input": torch.stack(samples)}, labels=labels, num_targets=len(samples))

    def loss(self, outputs, batch):
        return LossTerms(loss=nn.functional.cross_entropy(outputs, batch.labels, reduction="sum"))


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        seen = {"note": Path("conf/note.txt").read_text(), "greeting": GREETING, "helper": helpers.__file__,
                "package": trainer.__file__, "world": os.environ["WORLD_SIZE"], "level": os.environ["LEVEL"]}
        Path(os.environ["SEEN"]).write_text(json.dumps(seen))
    run(Mine, "trainer.max_steps=1", "trainer.global_batch=4", "trainer.micro_batch=2", "hooks=[]", "logger=[]")
"""


def project(folder: Path) -> Path:
    """A user's folder, with much in it that isn't to be sent."""
    files = {
        "jobs/train_it.py": SCRIPT,
        "jobs/helpers.py": "",
        "jobs/conf/note.txt": "mine",
        "jobs/.env": "AWS_SECRET_ACCESS_KEY=leaked",
        "jobs/.git/config": "",
        "jobs/.venv/pyvenv.cfg": "",
        "jobs/env/pyvenv.cfg": "",
        "jobs/env/lib/python.py": "",
        "jobs/__pycache__/helpers.cpython-311.pyc": "",
        "jobs/runs/first/checkpoints/big.safetensors": "",
        "jobs/deploy.pem": "leaked",
        "jobs/credentials.json": "leaked",
        "jobs/credentials.py": "",
        "jobs/nested/runs/kept.py": "",
        "elsewhere/mylib/__init__.py": "",
        "elsewhere/mylib/text.py": "GREETING = 'hello'\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "jobs" / "train_it.py"


def names(code: Code) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(code.archive)) as archive:
        return set(archive.getnames())


def text(code: Code, name: str) -> str:
    with tarfile.open(fileobj=io.BytesIO(code.archive)) as archive:
        file = archive.extractfile(name)
        assert file is not None
        return file.read().decode()


def test_pack_leaves_out_what_nobody_wants_to_send(tmp_path: Path) -> None:
    code = pack(Source(script=project(tmp_path), dependencies=[tmp_path / "elsewhere" / "mylib"]))
    mine = {name for name in names(code) if not name.startswith("shardwright/")}
    assert mine == {"train_it.py", "helpers.py", "credentials.py", "conf/note.txt", "nested/runs/kept.py",
                    "mylib/__init__.py", "mylib/text.py"}  # fmt: skip
    assert code.script == "train_it.py"
    ours = {name.removeprefix("shardwright/") for name in names(code) - mine}
    assert {"trainer/cli.py", "strategies/base.py", "conf/config.yaml", "scripts/container.py", "requirements.txt",
            "trainer/launch/container_setup.py"} <= ours  # fmt: skip
    assert not any("__pycache__" in name or name.startswith("tests") for name in ours)


def test_pack_of_the_same_files_is_the_same_whenever_and_wherever_they_are(tmp_path: Path) -> None:
    one, two = project(tmp_path / "a"), project(tmp_path / "b")
    os.utime(two, (1, 1))
    assert pack(Source(script=one)).digest == pack(Source(script=two)).digest
    two.write_text(SCRIPT + "\n")
    assert pack(Source(script=one)).digest != pack(Source(script=two)).digest


def test_pack_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    script = project(tmp_path)
    (script.parent / "linked").symlink_to(tmp_path / "elsewhere" / "mylib")
    (script.parent / "circle").symlink_to(script.parent)
    (script.parent / "gone.py").symlink_to(tmp_path / "nowhere.py")
    found = names(pack(Source(script=script)))
    assert "linked/text.py" in found
    assert not {name for name in found if name.startswith("circle") or name == "gone.py"}


def test_pack_of_our_own_script_sends_nothing_else() -> None:
    code = pack(Source(script=ROOT / "scripts" / "train.py"))
    assert code.script == "shardwright/scripts/train.py"
    assert all(name.startswith("shardwright/") for name in names(code))
    assert text(code, REQUIREMENTS).split() == needs()


def test_needs_are_those_of_the_package_and_the_range_of_torch() -> None:
    found = {line.split(">")[0]: line for line in needs()}
    assert {"hydra-core", "torch", "transformers", "numpy"} <= found.keys()
    assert "pytest" not in found
    assert "deepspeed==0.19.8" not in needs()


def test_needs_of_an_installed_package_are_those_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {line.replace(" ", "") for line in needs()}
    monkeypatch.setattr(sagemaker_code, "ROOT", tmp_path)
    found = {Requirement(line).name for line in needs()}
    assert found == {Requirement(line).name for line in before}


@pytest.mark.parametrize("for_toolkit", [False, True])
def test_pack_leads_pip_to_the_job_s_requirements(tmp_path: Path, for_toolkit: bool) -> None:
    script = project(tmp_path)
    (script.parent / "requirements.txt").write_text("mine==1\n")
    code = pack(Source(script=script), for_toolkit=for_toolkit)
    at = text(code, JOB_REQUIREMENTS).removeprefix("-r ../").strip()
    assert text(code, at) == "mine==1\n"
    assert any(line.startswith("torch>") for line in text(code, REQUIREMENTS).split()) is not for_toolkit
    if for_toolkit:
        assert text(code, "requirements.txt") == f"-r {REQUIREMENTS}\n-r {JOB_REQUIREMENTS}\n"
    other = tmp_path / "more.txt"
    other.write_text("more==1\n")
    code = pack(Source(script=script, requirements=other), for_toolkit=for_toolkit)
    assert text(code, text(code, JOB_REQUIREMENTS).removeprefix("-r ../").strip()) == "more==1\n"


def test_pack_refuses_what_is_too_big_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = project(tmp_path)
    (script.parent / "data.bin").write_bytes(bytes(5_000_000))
    monkeypatch.setattr(sagemaker_code, "_MOST_BYTES", 4_000_000)
    with pytest.raises(
        ConfigError, match=r"more than 3.8 MiB to send, such as data.bin \(4.8 MiB\).*launcher.channels"
    ):
        pack(Source(script=script))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folder": Path("elsewhere")}, "is not in"),
        ({"dependencies": [Path("elsewhere/none")]}, "there is no folder"),
        ({"dependencies": [Path("elsewhere/mylib"), Path("other/mylib")]}, "two folders mylib"),
        ({"requirements": Path("none.txt")}, "there is no file"),
        ({"script": Path("jobs/.hidden.py")}, "would be left out"),
        ({"folder": Path("bad"), "script": Path("bad/x.py")}, "holds a folder shardwright"),
    ],
)
def test_pack_refuses_what_cannot_be(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    script = project(tmp_path)
    for name in ("jobs/.hidden.py", "other/mylib/x.py", "bad/x.py", "bad/shardwright/trainer/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    given = {
        key: [tmp_path / each for each in value] if isinstance(value, list) else tmp_path / value
        for key, value in change.items()
    }
    with pytest.raises(ConfigError, match=said):
        pack(Source(**({"script": script} | given)))


class Container:
    """A tree like a container's `/opt/ml`, and the start of the program in it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.channel = base / "input" / "data" / "code"
        self.channel.mkdir(parents=True)
        (base / "checkpoints").mkdir()

    def fill(self, request: dict[str, Any]) -> None:
        """Do what the service does before the start."""
        import boto3

        files = boto3.client("s3")
        source = request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
        bucket, prefix = source.removeprefix("s3://").split("/", 1)
        for each in files.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
            files.download_file(bucket, each["Key"], str(self.channel / each["Key"].removeprefix(f"{prefix}/")))
        files.close()
        self.configure(request["HyperParameters"])

    def configure(self, hyperparameters: dict[str, str]) -> None:
        """The files that the service writes."""
        config = self.base / "input" / "config"
        config.mkdir()
        (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
        hosts = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
        (config / "resourceconfig.json").write_text(json.dumps(hosts))
        (config / "inputdataconfig.json").write_text(json.dumps({"code": {}}))

    def start(self, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """As the service does it, with this Python as the image's."""
        own = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        variables = {"PATH": path, "SAGEMAKER_BASE_DIR": str(self.base), "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
        return subprocess.run(
            ["/bin/bash", str(self.channel / "start.sh")],
            env=own | variables | environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def failure(self) -> str:
        """What the service would show."""
        return (self.base / "output" / "failure").read_text()


def test_sent_code_runs_with_every_kind_of_value(aws: Service, tmp_path: Path) -> None:
    script = project(tmp_path / "laptop")
    words = [
        *("trainer.max_steps=2", "trainer.nothing=null", "trainer.widths=[1,2]", "optimizer.lr=1e-3"),
        *("trainer.note='it\\'s \"so\", a=b $HOME ü'", "trainer.names={a:'it\\'s',b:'x y'}", "deterministic=true"),
    ]
    code = launch(
        *(f"--script={script}", "--name", "mine", "launcher.processes=2", "launcher.environment.LEVEL=3"),
        *(f"launcher.dependencies=['{tmp_path}/laptop/elsewhere/mylib']", *words),
    )
    assert code == 0
    [request] = aws.asked("CreateTrainingJob")
    container = Container(tmp_path / "ml")
    container.fill(request)
    seen = tmp_path / "seen.json"
    done = container.start({**request["Environment"], "SEEN": str(seen)})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(seen.read_text())
    assert Path(found.pop("package")).is_relative_to(tmp_path / "ml" / "code" / "shardwright")
    assert Path(found.pop("helper")) == tmp_path / "ml" / "code" / "helpers.py"
    assert found == {"note": "mine", "greeting": "hello", "world": "2", "level": "3"}
    config = yaml.safe_load((tmp_path / "ml" / "checkpoints" / "config.yaml").read_text())
    trainer = config["trainer"]
    assert (trainer["max_steps"], trainer["nothing"], trainer["widths"]) == (2, None, [1, 2])
    assert trainer["note"] == 'it\'s "so", a=b $HOME ü'
    assert trainer["names"] == {"a": "it's", "b": "x y"}
    assert (config["optimizer"]["lr"], config["deterministic"]) == (1e-3, True)
    assert (tmp_path / "ml" / "checkpoints" / "checkpoints" / "step-00000002").is_dir()
    assert "step=2/2 loss=" in done.stdout
    assert not (tmp_path / "ml" / "output" / "failure").exists()


def packed_container(folder: Path, script: Path, requirements: str | None = None) -> Container:
    if requirements is not None:
        (script.parent / "requirements.txt").write_text(requirements)
    code = pack(Source(script=script))
    container = Container(folder)
    (container.channel / "start.sh").write_bytes(code.start)
    (container.channel / "code.tar.gz").write_bytes(code.archive)
    container.configure({})
    return container


def wheel(folder: Path) -> Path:
    """The smallest package that pip takes."""
    path = folder / "shardwright_probe-1.0-py3-none-any.whl"
    info = "shardwright_probe-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("shardwright_probe.py", "FOUND = 1\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: shardwright-probe\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_start_installs_the_job_s_requirements_into_the_warm_pool_s_cache(tmp_path: Path) -> None:
    script = tmp_path / "jobs" / "probe.py"
    script.parent.mkdir()
    script.write_text("import os, shardwright_probe\nprint('FOUND', os.environ['PIP_CACHE_DIR'])\n")
    container = packed_container(tmp_path / "ml", script, "shardwright-probe==1.0\n")
    target = tmp_path / "site"
    done = container.start(
        {
            "SHARDWRIGHT_SCRIPT": "probe.py",
            "PIP_FIND_LINKS": str(wheel(tmp_path).parent),
            "PIP_TARGET": str(target),  # what runs the tests stays as it is
            "PYTHONPATH": str(target),
            "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tmp_path / "warm"),
        }
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"FOUND {tmp_path}/warm/pip" in done.stdout


@pytest.mark.parametrize(
    ("requirements", "said"),
    [
        ("no-such-package-at-all==9\n", "pip couldn't install what the image lacks: Could not find a version"),
        ("torch==1.0.0\n", "pip couldn't install what the image lacks: Cannot install torch==1.0.0"),
    ],
)
def test_start_says_why_pip_failed_and_leaves_torch_alone(tmp_path: Path, requirements: str, said: str) -> None:
    script = project(tmp_path / "laptop")
    container = packed_container(tmp_path / "ml", script, requirements)
    done = container.start({"SHARDWRIGHT_SCRIPT": "train_it.py"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert container.failure.startswith(f"ConfigError: SageMaker: {said}")
    assert len(container.failure.splitlines()) == 1


def test_start_refuses_an_image_without_a_fitting_torch(tmp_path: Path) -> None:
    container = packed_container(tmp_path / "ml", project(tmp_path / "laptop"))
    stand_in = tmp_path / "site" / "torch-1.13.1.dist-info"
    stand_in.mkdir(parents=True)
    (stand_in / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.1\n")
    done = container.start({"SHARDWRIGHT_SCRIPT": "train_it.py", "PYTHONPATH": str(stand_in.parent)})
    assert done.returncode == 2
    assert container.failure.startswith("ConfigError: SageMaker: the image has torch 1.13.1, torch>=2.6,<3 is needed.")


def test_start_with_a_damaged_archive_says_so(tmp_path: Path) -> None:
    container = packed_container(tmp_path / "ml", project(tmp_path / "laptop"))
    (container.channel / "code.tar.gz").write_bytes(b"nothing")
    done = container.start({"SHARDWRIGHT_SCRIPT": "train_it.py"})
    assert done.returncode == 1
    assert "code.tar.gz can't be unpacked" in container.failure
