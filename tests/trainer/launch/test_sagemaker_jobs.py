"""Jobs as a service gets them: requests field by field, and the code that is run from what was sent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.launch.service import IMAGE, NEEDED, ROLE, Service, aws, service_process
from trainer.commands import COMMANDS
from trainer.commands.launch import SCRIPT, launcher_of
from trainer.launch import LaunchJob, SageMakerLauncher, State
from trainer.launch.sagemaker_job import SubmittedJob
from trainer.sagemaker.hyperparameters import overrides_of
from trainer.sagemaker.metric_definitions import as_request, metric_definitions

__all__ = ["aws", "service_process"]

TINY = ("model=llama_tiny", "trainer.max_steps=2", "run.name=first_run")
NAME = re.compile(r"first-run-\d{8}-\d{6}-\d{3}")


def launch(*words: str) -> int:
    """As the command does it, in this process."""
    from trainer.cli import exit_code

    options = COMMANDS["launch"].parse([*NEEDED, *words])
    return exit_code(lambda: COMMANDS["launch"].run(options))


def created(service: Service) -> dict[str, Any]:
    """The one request, without what differs each time, which is looked at here."""
    [request] = service.asked("CreateTrainingJob")
    assert NAME.fullmatch(request.pop("TrainingJobName"))
    [code] = [channel for channel in request["InputDataConfig"] if channel["ChannelName"] == "code"]
    address = code["DataSource"]["S3DataSource"].pop("S3Uri")
    assert re.fullmatch(r"s3://models/mine/shardwright-code/[0-9a-f]{20}", address)
    return request


def expected(**different: Any) -> dict[str, Any]:
    """The request for `NEEDED` and `TINY`; with None a field is absent."""
    code = {"S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated"}
    request = {
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": as_request(metric_definitions()),
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["/opt/ml/input/data/code/start.sh"],
        },
        "InputDataConfig": [{"ChannelName": "code", "DataSource": {"S3DataSource": code}, "InputMode": "File"}],
        "OutputDataConfig": {"S3OutputPath": "s3://models/mine/first_run/output", "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100},
        "StoppingCondition": {"MaxRuntimeInSeconds": 86400},
        "CheckpointConfig": {"S3Uri": "s3://models/mine/first_run/checkpoints", "LocalPath": "/opt/ml/checkpoints"},
        "Environment": {"SHARDWRIGHT_SCRIPT": "shardwright/scripts/train.py", "SHARDWRIGHT_MAX_RESTARTS": "0"},
        "EnableManagedSpotTraining": False,
        "EnableNetworkIsolation": False,
        "EnableInterContainerTrafficEncryption": False,
        "Tags": [],
    } | different
    return {key: value for key, value in request.items() if value is not None}


def test_job_is_sent_as_it_is_described(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(*TINY) == 0
    request = created(aws)
    assert overrides_of(request.pop("HyperParameters")) == list(TINY)
    assert request == expected()
    out = capsys.readouterr().out
    assert re.search(r"^job first-run-\d{8}-\d{6}-\d{3}$", out, re.MULTILINE)
    assert "https://us-east-1.console.aws.amazon.com/sagemaker/home?region=us-east-1#/jobs/first-run-" in out
    assert "checkpoints: s3://models/mine/first_run/checkpoints\n" in out
    assert "\nfinished" in out


def test_spot_job_says_how_long_it_waits_and_everything_around_it(aws: Service) -> None:
    words = [
        *("launcher.instance_type=ml.p4d.24xlarge", "launcher.instance_count=2", "launcher.spot=true"),
        *("launcher.max_run=90m", "launcher.max_wait=3h", "launcher.retries=30", "launcher.volume_gb=500"),
        *("launcher.volume_key=alias/disk", "launcher.output_key=alias/out", "launcher.output=others/models/"),
        *("launcher.compressed=false", "launcher.efa=true", "launcher.processes=8"),
        "launcher.network={subnets:[subnet-1,subnet-2],security_groups:[sg-1],isolated:true,encrypted:true}",
        "launcher.registry={vpc:true,credentials:'arn:aws:lambda:us-east-1:123456789012:function:login'}",
        *("launcher.channels.train=s3://data/train", "launcher.channels.more={uri:s3://data/x,mode:fastfile}"),
        "launcher.channels.shared={file_system:fs-0123456789abcdef0,path:/abc/x,writable:true}",
        "launcher.channels.part={uri:s3://data/part,sharded:true}",
        *("launcher.environment.WANDB_MODE=offline", "launcher.environment.LEVEL=3", "launcher.tags.team=nlp"),
        *("launcher.metric_definitions.wer='wer=([0-9.]+)'", "launcher.hyperparameters.note=second"),
    ]
    assert launch(*words, *TINY) == 0
    request = created(aws)
    hyperparameters = request.pop("HyperParameters")
    assert hyperparameters.pop("note") == "second"
    assert overrides_of(hyperparameters) == list(TINY)
    whole = {"S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated"}
    wanted = expected(
        OutputDataConfig={"S3OutputPath": "s3://others/models", "CompressionType": "NONE", "KmsKeyId": "alias/out"},
        ResourceConfig={"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 500,
                        "VolumeKmsKeyId": "alias/disk"},
        StoppingCondition={"MaxRuntimeInSeconds": 5400, "MaxWaitTimeInSeconds": 10800},
        RetryStrategy={"MaximumRetryAttempts": 30},
        VpcConfig={"SecurityGroupIds": ["sg-1"], "Subnets": ["subnet-1", "subnet-2"]},
        EnableManagedSpotTraining=True,
        EnableNetworkIsolation=True,
        EnableInterContainerTrafficEncryption=True,
        Tags=[{"Key": "team", "Value": "nlp"}],
        Environment={
            "FI_EFA_USE_HUGE_PAGE": "0", "NCCL_NET": "AWS Libfabric", "WANDB_MODE": "offline", "LEVEL": "3",
            "SHARDWRIGHT_SCRIPT": "shardwright/scripts/train.py", "SHARDWRIGHT_MAX_RESTARTS": "0",
            "SHARDWRIGHT_PROCESSES": "8",
        },
    )  # fmt: skip
    wanted["AlgorithmSpecification"]["MetricDefinitions"].append({"Name": "wer", "Regex": "wer=([0-9.]+)"})
    wanted["AlgorithmSpecification"]["TrainingImageConfig"] = {
        "TrainingRepositoryAccessMode": "Vpc",
        "TrainingRepositoryAuthConfig": {
            "TrainingRepositoryCredentialsProviderArn": "arn:aws:lambda:us-east-1:123456789012:function:login"
        },
    }
    lustre = {"FileSystemId": "fs-0123456789abcdef0", "FileSystemType": "FSxLustre", "DirectoryPath": "/abc/x",
              "FileSystemAccessMode": "rw"}  # fmt: skip
    wanted["InputDataConfig"] += [
        {"ChannelName": "train", "DataSource": {"S3DataSource": {**whole, "S3Uri": "s3://data/train"}},
         "InputMode": "File"},
        {"ChannelName": "more", "DataSource": {"S3DataSource": {**whole, "S3Uri": "s3://data/x"}},
         "InputMode": "FastFile"},
        {"ChannelName": "shared", "DataSource": {"FileSystemDataSource": lustre}},
        {"ChannelName": "part", "DataSource": {"S3DataSource": {**whole, "S3Uri": "s3://data/part",
         "S3DataDistributionType": "ShardedByS3Key"}}, "InputMode": "File"},
    ]  # fmt: skip
    assert request == wanted


def test_job_with_warm_pool_keeps_its_machines(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    plan = "arn:aws:sagemaker:us-east-1:123456789012:training-plan/reserved"
    assert launch("launcher.keep_alive=30m", f"launcher.training_plan='{plan}'", *TINY) == 0
    request = created(aws)
    request.pop("HyperParameters")
    assert request == expected(
        ResourceConfig={"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100,
                        "KeepAlivePeriodInSeconds": 1800, "TrainingPlanArn": plan}
    )  # fmt: skip
    assert "ml.g5.2xlarge for training warm pool usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("distribution", "enabled", "options"),
    [
        ("mpi", "sagemaker_mpi_enabled", {"sagemaker_mpi_custom_mpi_options": '"-x A"'}),
        (
            "smddp",
            "sagemaker_distributed_dataparallel_enabled",
            {"sagemaker_distributed_dataparallel_custom_mpi_options": '"-x SMDATAPARALLEL_OPTIMIZE_SDP=true -x A"'},
        ),
        (
            "smdistributed",
            "sagemaker_distributed_dataparallel_enabled",
            {"sagemaker_distributed_dataparallel_custom_mpi_options": '"-x SMDATAPARALLEL_OPTIMIZE_SDP=true -x A"'},
        ),
    ],
)
def test_toolkit_s_launchers_are_asked_for_by_hyperparameters(
    aws: Service, distribution: str, enabled: str, options: dict[str, str]
) -> None:
    words = ["launcher.instance_type=p4d.24xlarge", "launcher.processes=8", "launcher.mpi_options='-x A'"]
    assert launch(f"launcher.distribution={distribution}", *words, *TINY) == 0
    [request] = aws.asked("CreateTrainingJob")
    [channel] = request["InputDataConfig"]
    address = channel["DataSource"]["S3DataSource"]["S3Uri"]
    hyperparameters = request["HyperParameters"]
    settings = {name: value for name, value in hyperparameters.items() if name.startswith("sagemaker_")}
    assert settings == {
        "sagemaker_program": '"shardwright/scripts/train.py"',
        "sagemaker_submit_directory": f'"{address}/code.tar.gz"',
        "sagemaker_container_log_level": "20",
        "sagemaker_instance_type": '"ml.p4d.24xlarge"',
        "sagemaker_mpi_num_of_processes_per_host": "8",
        enabled: "true",
        **options,
    }
    library = ["backend=smddp"] if distribution != "mpi" else []
    assert overrides_of(hyperparameters) == [*library, *TINY]
    assert "ContainerEntrypoint" not in request["AlgorithmSpecification"]
    environment = {"FI_EFA_USE_HUGE_PAGE": "0", "PYTHONPATH": "/opt/ml/code/shardwright"}
    more = {"SMDATAPARALLEL_OPTIMIZE_SDP": "true"} if library else {}
    assert request["Environment"] == environment | more


def test_second_job_of_a_run_goes_on_from_the_first_ones_checkpoints(aws: Service) -> None:
    assert launch(*TINY) == 0
    assert launch(*TINY, "trainer.max_steps=4") == 0
    one, two = aws.asked("CreateTrainingJob")
    assert one["TrainingJobName"] != two["TrainingJobName"]
    assert one["CheckpointConfig"] == two["CheckpointConfig"]
    assert one["InputDataConfig"] == two["InputDataConfig"], "the same code is at the same place"


def test_second_job_beside_one_that_runs_is_refused(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(*TINY) == 0
    [first] = aws.asked("CreateTrainingJob")
    aws.answers["ListTrainingJobs"] = lambda asked: {
        "TrainingJobSummaries": [{"TrainingJobName": first["TrainingJobName"], "TrainingJobStatus": "InProgress"}]
    }
    aws.answers["DescribeTrainingJob"] = lambda asked: {
        "TrainingJobName": asked["TrainingJobName"],
        "TrainingJobStatus": "InProgress",
        "CheckpointConfig": first["CheckpointConfig"],
    }
    assert launch(*TINY) == 2
    assert f"the job {first['TrainingJobName']} of the same run is still at work" in capsys.readouterr().err
    assert len(aws.asked("CreateTrainingJob")) == 1


def test_dry_run_prints_what_would_be_sent_and_asks_nobody(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    bare |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nsys.modules['boto3'] = sys.modules['botocore'] = None\n"
        "from trainer.cli import main\nmain(['launch', *sys.argv[1:]])\n"
    )
    words = [*NEEDED, *TINY, "--dry-run", "launcher.environment.HF_TOKEN=hf_12345678", "logger=[wandb]"]
    done = subprocess.run(
        [sys.executable, str(script), *words], env=bare, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    request = json.loads(done.stdout)
    assert NAME.fullmatch(request["TrainingJobName"])
    assert request["Environment"]["HF_TOKEN"] == "***"
    assert overrides_of(request["HyperParameters"]) == [*TINY, "logger=[wandb]"]
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400}


def test_launch_without_boto3_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert launch(*TINY) == 2
    assert "pip install 'shardwright[aws]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            {"__type": "ResourceLimitExceeded", "message": "The account-level limit is 0 instances."},
            "CreateTrainingJob: ResourceLimitExceeded: The account-level limit is 0 instances. Ask for a higher quota",
        ),
        ({"__type": "AccessDeniedException", "message": "not authorized"}, "Your own rights lack it"),
    ],
)
def test_what_aws_refuses_is_one_line(
    aws: Service, capsys: pytest.CaptureFixture[str], answer: dict[str, Any], said: str
) -> None:
    aws.answers["CreateTrainingJob"] = lambda asked: answer
    assert launch(*TINY) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_job_of_a_sweep_has_checkpoints_of_its_own_and_is_found_again(aws: Service, tmp_path: Path) -> None:
    launcher = launcher_of(NEEDED, {})
    job = LaunchJob(name="003", script=SCRIPT, overrides=TINY[:2], folder=tmp_path / "sweep-lr" / "003")
    started = launcher.start(job)
    assert isinstance(started, SubmittedJob)
    [request] = aws.asked("CreateTrainingJob")
    assert request["CheckpointConfig"]["S3Uri"] == "s3://models/mine/sweep-lr-003/checkpoints"
    assert started.status().state is State.finished  # moto's jobs end at once
    assert isinstance(launcher, SageMakerLauncher)
    found = launcher.find(job, started.handle)
    assert found is not None
    assert found.status().state is State.finished
    assert launcher.find(job, "nobody-knows-it") is None
