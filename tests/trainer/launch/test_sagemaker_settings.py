"""What the launcher refuses before anything is sent, each in one line, and what it understands."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.service import IMAGE, NEEDED, ROLE
from trainer.commands import COMMANDS
from trainer.launch import LaunchJob, SageMakerLauncher
from trainer.launch.sagemaker_code import ROOT
from trainer.launch.sagemaker_limits import has_efa, instance_type, torchrun_takes
from trainer.launch.sagemaker_parts import Distribution, today
from trainer.launch.sagemaker_request import job_name

TRAIN = ROOT / "scripts" / "train.py"
GIVEN = {"role": ROLE, "image": IMAGE, "bucket": "models/mine", "instance_type": "ml.p4d.24xlarge"}


def check(*words: str, **settings: Any) -> SageMakerLauncher:
    launcher = SageMakerLauncher(**{**GIVEN, **settings})
    launcher.check([LaunchJob(name="run", script=TRAIN, overrides=words)])
    return launcher


def test_check_takes_what_is_needed_and_nothing_more() -> None:
    assert check().remarks() == []


@pytest.mark.parametrize("kind", ["g5.2xlarge", "ml.g5.2xlarge", "ML.G5.2XLARGE", " ml.g5.2xlarge "])
def test_instance_type_is_taken_with_and_without_its_prefix(kind: str) -> None:
    assert instance_type(kind) == "ml.g5.2xlarge"


@pytest.mark.parametrize("kind", ["ml.p6-b200.48xlarge", "ml.p6e-gb200.36xlarge", "ml.m7i-flex.large", "ml.t3.medium"])
def test_instance_type_is_taken_in_every_form_that_there_is(kind: str) -> None:
    assert instance_type(kind) == kind


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"role": None}, "launcher.role"),
        ({"role": "training"}, "role=training is no role's ARN"),
        ({"image": None}, "pytorch-training"),
        ({"image": "s3://x/y"}, "launcher.image"),
        ({"image": f"{IMAGE} "}, "launcher.image"),
        ({"bucket": None}, "launcher.bucket"),
        ({"bucket": "Models"}, "launcher.bucket"),
        ({"bucket": "m"}, "launcher.bucket"),
        ({"bucket": "models//x"}, "launcher.bucket"),
        ({"bucket": "gs://models/x"}, "launcher.bucket"),
        ({"output": "https://models"}, "launcher.output"),
        ({"instance_type": None}, "launcher.instance_type"),
        ({"instance_type": "p4d"}, "instance_type=p4d"),
        ({"instance_type": "ml.p4d.24xlarg"}, "launcher.instance_type"),
        ({"instance_count": 0}, "instance_count=0 is not in 1 to 1000"),
        ({"retries": 0}, "retries=0 is not in 1 to 30"),
        ({"retries": 31}, "retries=31 is not in 1 to 30"),
        ({"processes": 0}, "processes=0"),
        ({"volume_gb": 0}, "volume_gb=0"),
        ({"max_run": "29d"}, "28 days"),
        ({"max_run": "soon"}, "launcher.max_run"),
        ({"max_wait": "2d"}, "spot=false"),
        ({"spot": True, "max_run": "2h", "max_wait": "1h"}, "max_wait=1h is shorter than max_run=2h"),
        ({"spot": True, "keep_alive": "10m"}, "spot=true and keep_alive=10m"),
        ({"keep_alive": "61m"}, "more than an hour"),
        ({"spot": True, "training_plan": "arn"}, "launcher.training_plan"),
        ({"max_restarts": 1, "instance_count": 2}, "max_restarts=1 is for one host"),
        ({"max_restarts": 1, "distribution": Distribution.mpi}, "mpirun can't go on"),
        ({"mpi_options": "-x A"}, "launcher.mpi_options"),
        ({"efa": True, "instance_type": "g5.2xlarge"}, "ml.g5.2xlarge has none"),
        ({"distribution": Distribution.smddp, "instance_type": "p5.48xlarge"}, "SMDDP is for ml.p4d.24xlarge"),
        ({"compiler_config": {"enabled": True}}, "compile=true"),
        ({"environment": {"A B": "x"}}, "launcher.environment.A B"),
        ({"environment": {"A": "x" * 513}}, "513 characters"),
        ({"environment": {"RANK": "0"}}, "RANK is set in the job by itself"),
        ({"environment": {f"A{number}": "" for number in range(91)}}, "91 variables"),
        ({"tags": {"aws:x": "y"}}, "aws:x"),
        ({"tags": {f"t{number}": "" for number in range(51)}}, "51 tags"),
        ({"hyperparameters": {"d": "1"}}, "torchrun would take --d"),
        ({"hyperparameters": {"sagemaker_program": "x"}}, "set by itself"),
        ({"hyperparameters": {"shardwright_0": "x"}}, "set by itself"),
        ({"hyperparameters": {"note": "x" * 2501}}, "2,501 characters"),
        ({"metric_definitions": {"wer": "wer=[0-9]+"}}, "no group"),
        ({"metric_definitions": {"wer": "wer=(["}}, "can't be read"),
        ({"metric_definitions": {"wer": f"({'x' * 499})"}}, "501 characters"),
        ({"metric_definitions": {f"m{number}": "(x)" for number in range(28)}}, "41 metrics"),
        ({"channels": {"code": "s3://data/x"}}, "is taken by the code"),
        ({"channels": {"a b": "s3://data/x"}}, "other characters"),
        ({"channels": {"train": "/data"}}, "no address in S3"),
        ({"channels": {"train": 3}}, "is no channel"),
        ({"channels": {"train": {"uri": "s3://data/x", "mode": "pipe"}}}, "Set mode=fastfile"),
        ({"channels": {"train": {"uri": "s3://data/x", "mode": "fast"}}}, "Nearest: fastfile"),
        ({"channels": {"train": {"url": "s3://data/x"}}}, "Nearest: uri"),
        ({"channels": {"train": {"uri": "s3://data/x", "path": "/x"}}}, "path is a file system's"),
        ({"channels": {"train": {"file_system": "fs-01234567", "path": "/x"}}}, "launcher.network.subnets"),
        ({"channels": {"train": {"file_system": "fs-x", "path": "/x"}}}, "is no file system"),
        ({"channels": {"train": {"file_system": "fs-01234567"}}}, "which directory"),
        ({"channels": {"train": {"file_system": "fs-01234567", "path": "/x", "type": "nfs"}}}, "type=nfs"),
        ({"channels": {f"c{number}": "s3://data/x" for number in range(20)}}, "20 channels"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(**settings)
    assert said in str(error.value)
    assert str(error.value).startswith(("launch: ", "Trainer: launcher.")), str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((").", ")")), "the key is at its end"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.network={subnets:[subnet-1]}"], "a VPC takes both"),
        (["launcher.registry={credentials:arn}"], "launcher.registry.vpc=true"),
        (["launcher.distribution=torchrn"], "expected one of [torchrun, mpi, smddp"),
        (["launcher.instance_typ=x"], "Nearest: instance_type"),
        (["trainer.max_step=3"], "Nearest: max_steps"),
        (["launcher.distribution=smddp", "launcher.instance_type=p4d.24xlarge", "backend=nccl"], "backend=nccl"),
        (["--script=docs/examples/digits.py"], "Give one, as in --name first"),
        (["--script=none.py", "--name=x"], "there is no script none.py"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    from trainer.cli import exit_code

    monkeypatch.chdir(ROOT)
    options = COMMANDS["launch"].parse([*NEEDED, "--dry-run", *words])
    assert exit_code(lambda: COMMANDS["launch"].run(options)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("torch_distributed", "torchrun"),
        ("pytorchddp", "torchrun"),
        ("deepspeed", "torchrun"),
        ("smdistributed", "smddp"),
    ],
)
def test_old_name_of_a_distribution_is_understood_and_answered(given: str, taken: str) -> None:
    launcher = check(distribution=Distribution[given])
    assert today(launcher.distribution) is Distribution[taken]
    [line] = launcher.remarks()
    assert line.startswith(f"launcher.distribution={given} is ")
    assert line.endswith(f"taken as {taken}.")


def test_remarks_tell_what_costs_or_slows_down() -> None:
    [line] = check(instance_type="g5.2xlarge", instance_count=2).remarks()
    assert line == "ml.g5.2xlarge has no EFA: the 2 hosts talk over TCP"
    [line] = check(keep_alive="30m").remarks()
    assert "billed" in line
    assert "ml.p4d.24xlarge for training warm pool usage" in line


@pytest.mark.parametrize("name", ["d", "m", "log", "max", "node", "master", "nnodes", "role", "max-restarts", "no_py"])
def test_name_that_torchrun_would_take_is_found(name: str) -> None:
    assert torchrun_takes(name) is not None


@pytest.mark.parametrize("name", ["lr", "trainer.max_steps", "x", "epochs", "model", "masters", "data"])
def test_name_that_torchrun_leaves_alone_is_taken(name: str) -> None:
    assert torchrun_takes(name) is None


@pytest.mark.parametrize("name", ["d", "log", "max", "node", "master"])
def test_torchrun_does_stumble_over_such_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["train.py", f"--{name}", "1"])
    assert "ambiguous option" in capsys.readouterr().err


def test_has_efa_is_known_of_the_table_s_types() -> None:
    with_efa = ("p3dn.24xlarge", "p4d.24xlarge", "p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge", "g5.48xlarge",
                "g6e.48xlarge", "trn1.32xlarge")  # fmt: skip
    assert all(has_efa(f"ml.{kind}") for kind in with_efa)
    assert not any(has_efa(f"ml.{kind}") for kind in ("p3.16xlarge", "g5.xlarge", "g6e.xlarge", "m5.large"))


@pytest.mark.parametrize("run", ["a", "llama_tiny-python_stdlib-02b7bc", "x" * 200, "..odd..name--", "ü"])
def test_job_name_has_the_service_s_form(run: str) -> None:
    name = job_name(run, datetime(2026, 11, 22, 5, 4, 3, 21000, tzinfo=UTC))
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)
    assert name.endswith("-20261122-050403-021")


def test_request_is_what_boto3_takes() -> None:
    """botocore knows the service's names, types and lengths."""
    import botocore.session
    from botocore.validate import ParamValidator

    launcher = check(
        *["trainer.max_steps=3"] * 400, spot=True, retries=3, volume_key="alias/x", output_key="alias/y", processes=8,
        channels={"train": "s3://data/x", "more": {"uri": "s3://data/y", "mode": "fastfile"}},
    )  # fmt: skip
    job = LaunchJob(name="run", script=TRAIN, overrides=("trainer.max_steps=3",) * 400)
    request = launcher.request(job, launcher.packed_code(job))
    assert len(request["HyperParameters"]) > 3
    model = botocore.session.get_session().get_service_model("sagemaker")
    shape = model.operation_model("CreateTrainingJob").input_shape
    assert ParamValidator().validate(request, shape).generate_report() == ""


def test_secrets_are_hidden_in_what_is_shown(tmp_path: Path) -> None:
    launcher = check(environment={"WANDB_API_KEY": "0123456789abcdef", "GITHUB_TOKEN": "tok-12345678", "LEVEL": "3"})
    job = LaunchJob(name="run", script=TRAIN, overrides=("+logger.wandb.api_key=0123456789abcdef",))
    shown = launcher.shown(job)
    assert "tok-12345678" not in shown
    assert '"LEVEL": "3"' in shown
    [line] = launcher.remarks(job.overrides)
    assert line.startswith("+logger.wandb.api_key: whoever may describe the job can read it")
    real = launcher.request(job, launcher.packed_code(job))
    assert real["HyperParameters"]["shardwright_0"] not in shown
