"""What a person sees of a job that SageMaker has, and what Ctrl-C does."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import boto3
import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.service import Service, aws, service_process
from trainer.launch import LaunchJob, State
from trainer.launch.sagemaker_code import ROOT
from trainer.launch.sagemaker_follow import follow
from trainer.launch.sagemaker_job import Services, SubmittedJob, console_link

__all__ = ["aws", "service_process"]

REQUEST = {"TrainingJobName": "mine-1", "CheckpointConfig": {"S3Uri": "s3://models/mine/checkpoints"}}
GROUP = "/aws/sagemaker/TrainingJobs"
BEGIN = datetime(2026, 11, 22, tzinfo=UTC).timestamp()


def described(status: str, second: str = "Training", **more: Any) -> dict[str, Any]:
    transitions = [
        {"Status": each, "StartTime": BEGIN, "StatusMessage": f"{each} ..."} for each in ("Starting", second)
    ]
    return {"TrainingJobName": "mine-1", "TrainingJobStatus": status, "SecondaryStatus": second,
            "SecondaryStatusTransitions": transitions, **more}  # fmt: skip


def answering(service: Service, *answers: dict[str, Any]) -> None:
    """One after the other; the last one for good."""
    left = itertools.chain(answers, itertools.repeat(answers[-1]))
    service.answers["DescribeTrainingJob"] = lambda asked: next(left)


@pytest.fixture
def services(aws: Service) -> Iterator[Services]:
    found = Services("us-east-1")
    yield found
    found.close()


def write_log(stream: str, lines: Sequence[str]) -> None:
    logs = boto3.client("logs")
    existing = [group["logGroupName"] for group in logs.describe_log_groups()["logGroups"]]
    if GROUP not in existing:
        logs.create_log_group(logGroupName=GROUP)
    logs.create_log_stream(logGroupName=GROUP, logStreamName=stream)
    now = int(datetime.now(UTC).timestamp() * 1000)
    events = [{"timestamp": now, "message": line} for line in lines]
    logs.put_log_events(logGroupName=GROUP, logStreamName=stream, logEvents=events)
    logs.close()


def show(services: Services, name: str = "mine-1", ask: Callable[[str], bool] | None = None) -> tuple[int, str]:
    stream = io.StringIO()
    code = follow({**REQUEST, "TrainingJobName": name}, services, stream, ask=ask)
    return code, stream.getvalue()


def test_follow_shows_transitions_once_and_every_line_of_every_host(aws: Service, services: Services) -> None:
    many = [f"line {number}" for number in range(50)]
    write_log("seen/algo-1-1700000000", ["step=100/1800 loss=1.5000 lr=0.001 eta=0:10:00", *many])
    write_log("seen/algo-2-1700000000", ["hello \x1b[31m"])
    write_log("seen-also/algo-1-1700000000", ["not ours"])
    answering(
        aws,
        described("InProgress", "Downloading"),
        described("InProgress"),
        described("InProgress"),
        described(
            "Completed", "Completed", TrainingTimeInSeconds=600, BillableTimeInSeconds=240,
            ResourceConfig={"InstanceCount": 2}, ModelArtifacts={"S3ModelArtifacts": "s3://models/x.tar.gz"},
        ),
    )  # fmt: skip
    code, out = show(services, "seen")
    assert code == 0
    assert [line for line in out.splitlines() if line.endswith(" ...")] == [
        *("Starting: Starting ...", "Downloading: Downloading ...", "Training: Training ..."),
        "Completed: Completed ...",
    ]
    assert [line for line in out.splitlines() if line.startswith("line ")] == many
    assert "step=100/1800 loss=1.5000 lr=0.001 eta=0:10:00\n" in out
    assert "[algo-2] hello \N{REPLACEMENT CHARACTER}[31m\n" in out
    assert "not ours" not in out
    assert "training 0:10:00; billed 240 s for each of 2 hosts, 60% saved by spot" in out
    assert "model: s3://models/x.tar.gz" in out


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        ("Stopped", "", 75),
        ("Failed", "AlgorithmError: ConfigError: Data: there is no file x. (data.path), exit code: 2", 2),
        ("Failed", "AlgorithmError: \nTrainingError: rank 1 was ended by SIGKILL\nmore, exit code: 1", 1),
        ("Failed", "InternalServerError: We encountered an internal error. Please try again.", 1),
        ("Failed", "AlgorithmError: TrainingError: the script ended with exit code 75, exit code: 75", 75),
    ],
)
def test_follow_ends_with_the_exit_code_that_the_job_s_end_means(
    aws: Service, services: Services, status: str, reason: str, code: int
) -> None:
    answering(aws, described(status, status, FailureReason=reason))
    found, out = show(services)
    assert found == code
    for line in ("ConfigError: Data: there is no file x.", "TrainingError: rank 1 was ended by SIGKILL"):
        assert (line in reason) == (line in out)
    assert "InternalServerError" not in reason or reason in out


class Impatient:
    """Presses Ctrl-C after the first look."""

    def __init__(self, service: Service, *then: dict[str, Any]) -> None:
        left = itertools.chain(then, itertools.repeat(then[-1] if then else {}))
        self._pressed = False

        def answer(asked: dict[str, Any]) -> dict[str, Any]:
            return described("InProgress") if not self._pressed else next(left)

        service.answers["DescribeTrainingJob"] = answer

    def sleep(self, seconds: float) -> None:
        if not self._pressed:
            self._pressed = True
            raise KeyboardInterrupt


def test_ctrl_c_asks_and_yes_stops_the_job(aws: Service, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = Impatient(aws, described("Stopping", "Stopping"), described("Stopped", "Stopped"))
    monkeypatch.setattr("trainer.launch.following.time.sleep", impatient.sleep)
    aws.answers["StopTrainingJob"] = lambda asked: {}
    asked: list[str] = []
    code, out = show(services, ask=lambda question: asked.append(question) is None)
    assert asked == ["Stop the job mine-1? [y/N] "]
    assert aws.asked("StopTrainingJob") == [{"TrainingJobName": "mine-1"}]
    assert code == 75
    assert "two minutes for a checkpoint" in out
    assert "the same command goes on" in out


def test_ctrl_c_without_a_terminal_leaves_the_job_and_says_how_to_stop_it(
    aws: Service, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Impatient(aws)
    monkeypatch.setattr("trainer.launch.following.time.sleep", impatient.sleep)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out = show(services)
    assert code == 130
    assert aws.asked("StopTrainingJob") == []
    assert "aws sagemaker stop-training-job --region us-east-1 --training-job-name mine-1" in out


class Terminal(io.StringIO):
    """Takes escapes, and says yes."""

    def isatty(self) -> bool:
        return True


def test_ctrl_c_at_a_terminal_takes_the_answer_of_the_person(
    aws: Service, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Impatient(aws, described("Stopped", "Stopped"))
    monkeypatch.setattr("trainer.launch.following.time.sleep", impatient.sleep)
    monkeypatch.setenv("TERM", "xterm")
    aws.answers["StopTrainingJob"] = lambda asked: {}
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    monkeypatch.setattr(sys, "stderr", Terminal())
    code, _ = show(services)
    assert code == 75
    assert len(aws.asked("StopTrainingJob")) == 1


def test_follow_on_a_terminal_shows_a_bar(aws: Service, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    write_log("bar/algo-1-1", ["step=900/1800 loss=1.5000 eta=0:10:00", "step=900 val_loss=2.2500"])
    answering(aws, described("Completed", "Completed"))
    stream = Terminal()
    assert follow({**REQUEST, "TrainingJobName": "bar"}, services, stream) == 0
    out = stream.getvalue()
    assert "step 900/1800" in out
    assert "50%" in out
    assert "val 2.2500" in out


def test_submitted_job_is_asked_about_at_most_every_ten_seconds(aws: Service, services: Services) -> None:
    now = [0.0]
    job = SubmittedJob(LaunchJob(name="mine", script=ROOT), "mine-1", services, now=lambda: now[0])
    answering(
        aws,
        described("InProgress", "Starting"),
        described("InProgress"),
        described("Failed", "Failed", FailureReason="AlgorithmError: TrainingError: why",
                  FinalMetricDataList=[{"MetricName": "val_loss", "Value": 1.5, "Timestamp": BEGIN}]),
    )  # fmt: skip
    assert job.status().state is State.waiting
    now[0] = 9.0
    assert job.status().state is State.waiting
    assert len(aws.asked("DescribeTrainingJob")) == 1
    now[0] = 10.0
    assert job.status().state is State.running
    now[0] = 20.0
    status = job.status()
    assert (status.state, status.metrics) == (State.failed, {"val_loss": 1.5})
    assert status.detail == "AlgorithmError: TrainingError: why"
    now[0] = 99.0
    job.stop()
    assert len(aws.asked("DescribeTrainingJob")) == 3
    assert aws.asked("StopTrainingJob") == [], "it is over"


def test_submitted_job_is_stopped(aws: Service, services: Services) -> None:
    answering(aws, described("InProgress"))
    aws.answers["StopTrainingJob"] = lambda asked: {}
    SubmittedJob(LaunchJob(name="mine", script=ROOT), "mine-1", services).stop()
    assert aws.asked("StopTrainingJob") == [{"TrainingJobName": "mine-1"}]


def test_services_without_a_region_ask_for_one(aws: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(ConfigError, match=r"launcher\.region=us-east-1"):
        Services(None)


def test_services_without_credentials_say_what_to_set(aws: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    bare = Services("us-east-1")
    with pytest.raises(ConfigError, match=r"credentials\. Set AWS_PROFILE"):
        bare.describe("mine-1")
    bare.close()


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-east-1", "us-east-1.console.aws.amazon.com"),
        ("cn-north-1", "cn-north-1.console.amazonaws.cn"),
        ("us-gov-west-1", "us-gov-west-1.console.amazonaws-us-gov.com"),
    ],
)
def test_console_link_leads_to_the_partition_s_console(region: str, host: str) -> None:
    assert console_link("mine-1", region) == f"https://{host}/sagemaker/home?region={region}#/jobs/mine-1"


def test_follow_outlasts_a_short_silence_of_aws_but_not_a_long_one(
    aws: Service, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = {"__type": "ExpiredTokenException", "message": "expired"}
    answering(aws, silent, silent, described("Completed", "Completed"))
    code, out = show(services)
    assert code == 0
    assert out.count("ExpiredTokenException: expired. Log in again. The job goes on") == 1
    monkeypatch.setattr("trainer.launch.following.PATIENCE_S", 0.0)
    answering(aws, silent)
    with pytest.raises(ConfigError, match="Log in again"):
        show(services)
