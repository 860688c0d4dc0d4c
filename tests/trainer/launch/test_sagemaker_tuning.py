"""A sweep as a tuning job: the request, the words of its jobs, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.service import IMAGE, NEEDED, ROLE, Service, aws, service_process
from trainer.commands import COMMANDS
from trainer.launch.sagemaker_tuning import progress, ranges
from trainer.launch.space import search_space
from trainer.sagemaker.hyperparameters import overrides_of
from trainer.sagemaker.metric_definitions import as_request, metric_definitions

__all__ = ["aws", "service_process"]

WORDS = ("trainer.max_steps=20", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "trainer.global_batch=8,16",
         "optimizer=adamw,sgd", "seed=range(0,5)", "optimizer.weight_decay=range(0,0.3,0.1)")  # fmt: skip


def tune(*words: str) -> int:
    from trainer.cli import exit_code

    options = COMMANDS["launch"].parse([*NEEDED, "--multirun", "--search", "sagemaker", "--name", "first", *words])
    return exit_code(lambda: COMMANDS["launch"].run(options))


def test_tuning_job_is_made_from_the_sweep(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    counters = {"Completed": 3, "InProgress": 1}
    answers = iter(
        [
            {"HyperParameterTuningJobStatus": "InProgress", "TrainingJobStatusCounters": counters},
            {
                "HyperParameterTuningJobStatus": "Completed",
                "TrainingJobStatusCounters": {"Completed": 4},
                "BestTrainingJob": {
                    "TrainingJobName": "first-003",
                    "TunedHyperParameters": {"optimizer.lr": "0.01"},
                    "FinalHyperParameterTuningJobObjectiveMetric": {"MetricName": "val_loss", "Value": 1.5},
                },
            },
        ]
    )
    aws.answers["CreateHyperParameterTuningJob"] = lambda asked: {"HyperParameterTuningJobArn": "arn"}
    aws.answers["DescribeHyperParameterTuningJob"] = lambda asked: next(answers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.launch.sagemaker_tuning.time.sleep", lambda seconds: None)
        assert tune("--trials", "30", "--search-seed", "7", "launcher.jobs=4", *WORDS) == 0
    [request] = aws.asked("CreateHyperParameterTuningJob")
    assert re.fullmatch(r"first-\d{6}-\d{6}", request.pop("HyperParameterTuningJobName"))
    definition = request["TrainingJobDefinition"]
    source = definition["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"]
    hyperparameters = definition.pop("StaticHyperParameters")
    assert {name: value for name, value in hyperparameters.items() if name.startswith("sagemaker_")} == {
        "sagemaker_program": '"shardwright/scripts/train.py"',
        "sagemaker_submit_directory": f'"{source}/code.tar.gz"',
        "sagemaker_container_log_level": "20",
        "sagemaker_instance_type": '"ml.g5.2xlarge"',
        "sagemaker_torch_distributed_enabled": "true",
    }
    chosen = {"optimizer.lr": "0.0123", "optimizer": "sgd", "_tuning_objective_metric": "val_loss"}
    words = overrides_of({**hyperparameters, **chosen})
    assert words == ["trainer.max_steps=20", "optimizer.lr=0.0123", "optimizer=sgd"]
    channel = {"S3DataType": "S3Prefix", "S3DataDistributionType": "FullyReplicated", "S3Uri": source}
    assert request == {
        "HyperParameterTuningJobConfig": {
            "Strategy": "Bayesian",
            "HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "val_loss"},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": 30, "MaxParallelTrainingJobs": 4},
            "ParameterRanges": {
                "ContinuousParameterRanges": [
                    {"Name": "optimizer.lr", "MinValue": "0.0001", "MaxValue": "0.1", "ScalingType": "Logarithmic"}
                ],
                "IntegerParameterRanges": [{"Name": "seed", "MinValue": "0", "MaxValue": "4", "ScalingType": "Linear"}],
                "CategoricalParameterRanges": [
                    {"Name": "trainer.global_batch", "Values": ["8", "16"]},
                    {"Name": "optimizer", "Values": ["adamw", "sgd"]},
                    {"Name": "optimizer.weight_decay", "Values": ["0.0", "0.1", "0.2"]},
                ],
            },
            "TrainingJobEarlyStoppingType": "Auto",
            "RandomSeed": 7,
        },
        "TrainingJobDefinition": {
            "AlgorithmSpecification": {
                "TrainingImage": IMAGE,
                "TrainingInputMode": "File",
                "MetricDefinitions": as_request(metric_definitions()),
            },
            "RoleArn": ROLE,
            "InputDataConfig": [{"ChannelName": "code", "DataSource": {"S3DataSource": channel}, "InputMode": "File"}],
            "OutputDataConfig": {"S3OutputPath": "s3://models/mine/first/output", "CompressionType": "GZIP"},
            "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100},
            "StoppingCondition": {"MaxRuntimeInSeconds": 86400},
            "EnableNetworkIsolation": False,
            "EnableInterContainerTrafficEncryption": False,
            "EnableManagedSpotTraining": False,
            "Environment": {"PYTHONPATH": "/opt/ml/code/shardwright"},
        },
        "Tags": [],
    }
    out = capsys.readouterr().out
    assert "InProgress: 3 completed, 1 running\n" in out
    assert "Completed: 4 completed, best: val_loss 1.5000 by first-003 (optimizer.lr=0.01)\n" in out


def test_tuning_job_is_shown_without_a_call_and_is_what_boto3_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    monkeypatch.setattr("trainer.checking.refuse_wrong_jobs", lambda script, jobs: None)  # takes seconds
    words = ["--sampler", "random", "--pruner", "none", "--maximize", "--objective", "val_accuracy", "--dry-run"]
    assert tune(*words, *WORDS) == 0
    request = json.loads(capsys.readouterr().out)
    model = botocore.session.get_session().get_service_model("sagemaker")
    shape = model.operation_model("CreateHyperParameterTuningJob").input_shape
    assert ParamValidator().validate(request, shape).generate_report() == ""
    config = request["HyperParameterTuningJobConfig"]
    assert config["Strategy"] == "Random"
    assert config["TrainingJobEarlyStoppingType"] == "Off"
    objective = {"Type": "Maximize", "MetricName": "val_accuracy"}
    assert config["HyperParameterTuningJobObjective"] == objective


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.max_steps=20"], "0 keys have several values"),
        (["seed=1,2", "--objective", "val_los"], "Nearest: val_loss"),
        (["seed=range(0,62,2)"], "31 values"),
        (["seed=1,2", "--pruner", "halving"], "--pruner median"),
        (["seed=1,2", "--prune-after", "5"], "--prune-after"),
        (["sed=1,2"], "there is no key 'sed'"),
        (["seed=1,2", "launcher.registry={vpc:true}"], "private registry"),
    ],
)
def test_tuning_job_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert tune("--dry-run", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_values_lose_the_quotes_that_the_job_puts_back() -> None:
    space = search_space(["data.text='it\\'s',\"b c\",d"])
    [found] = ranges(space.parameters)["CategoricalParameterRanges"]
    assert found["Values"] == ["it's", "b c", "d"]
    assert overrides_of({"data.text": found["Values"][1]}) == ["data.text='b c'"]


def test_torchrun_s_own_words_are_no_keys_of_a_tuning_job() -> None:
    from datetime import UTC, datetime

    from trainer.launch import SageMakerLauncher
    from trainer.launch.sagemaker_tuning import Tuning, tuning_job

    settings = SageMakerLauncher(role=ROLE, image=IMAGE, bucket="models/mine", instance_type="ml.g5.2xlarge")
    arguments: dict[str, Any] = {"run": "x", "script": "x.py", "code": "s3://x/y", "now": datetime.now(UTC)}
    with pytest.raises(ConfigError, match="torchrun would take --max"):
        tuning_job(settings, Tuning(space=search_space(["max=1,2"])), **arguments)


def test_progress_names_what_failed() -> None:
    found = {"HyperParameterTuningJobStatus": "Failed", "TrainingJobStatusCounters": {"NonRetryableError": 2},
             "FailureReason": "all failed"}  # fmt: skip
    assert progress(found) == "Failed: 2 failed; all failed"


def test_sweep_sends_each_job_with_checkpoints_of_its_own(
    aws: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.cli import exit_code

    aws.answers["DescribeTrainingJob"] = lambda asked: {
        "TrainingJobName": asked["TrainingJobName"],
        "TrainingJobStatus": "Completed",
        "FinalMetricDataList": [{"MetricName": "val_loss", "Value": 1.5, "Timestamp": 1700000000}],
    }
    monkeypatch.setattr("trainer.checking.refuse_wrong_jobs", lambda script, jobs: None)  # takes seconds
    words = ["--multirun", "--sweep-dir", str(tmp_path / "lr"), "optimizer.lr=1e-3,1e-2", "trainer.max_steps=2"]
    options = COMMANDS["launch"].parse([*NEEDED, *words])
    assert exit_code(lambda: COMMANDS["launch"].run(options)) == 0
    requests = aws.asked("CreateTrainingJob")
    assert [overrides_of(request["HyperParameters"])[-1] for request in requests] == [
        "optimizer.lr=0.001",
        "optimizer.lr=0.01",
    ]
    places = {request["CheckpointConfig"]["S3Uri"] for request in requests}
    assert len(places) == 2
    assert all(place.startswith("s3://models/mine/lr-") for place in places)
    assert "1.5000" in capsys.readouterr().out
