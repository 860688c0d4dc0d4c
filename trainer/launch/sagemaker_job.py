"""What is asked of AWS: a few calls of boto3, and what AWS says as one line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, LaunchJob, State, Status
from trainer.launch.sagemaker_limits import split_address
from trainer.launch.sagemaker_request import plain_name

_STATES = {
    "InProgress": State.running,
    "Completed": State.finished,
    "Failed": State.failed,
    "Stopping": State.running,
    "Stopped": State.stopped,
}
_BEFORE_START = ("Starting", "LaunchingMLInstances", "PreparingTrainingStack", "Downloading", "Pending", "Interrupted",
                 "DownloadingTrainingImage")  # fmt: skip
_LOGS = "/aws/sagemaker/TrainingJobs"


class Services:
    """SageMaker, S3 and CloudWatch's logs in one region.

    Args:
        region: None: as AWS's configuration says.

    Raises:
        ConfigError: there is no boto3, or no region.
    """

    def __init__(self, region: str | None) -> None:
        session, settings = session_in(region, "sagemaker")
        self.region: str = session.region_name
        with told():
            self.jobs = session.client("sagemaker", config=settings)
            self._files = session.client("s3", config=settings)
            self._logs = session.client("logs", config=settings)

    def close(self) -> None:
        """Let go of the connections."""
        for client in (self.jobs, self._files, self._logs):
            client.close()

    def put(self, address: str, files: Mapping[str, bytes], key: str | None) -> None:
        """Put files below an address that is named after their content, unless they are there.

        Args:
            address: `s3://bucket/prefix`.
            files: name -> content.
            key: of KMS; None: as the bucket does it.

        Raises:
            ConfigError: the bucket doesn't take them.
        """
        bucket, prefix = split_address(address)
        encrypted = {} if key is None else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key}
        with told():
            for name, content in files.items():
                if not self._there(bucket, f"{prefix}/{name}", len(content)):
                    self._files.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content, **encrypted)

    def _there(self, bucket: str, key: str, size: int) -> bool:
        from botocore.exceptions import ClientError

        try:
            return int(self._files.head_object(Bucket=bucket, Key=key)["ContentLength"]) == size
        except ClientError:  # also where one may write, but not look
            return False

    def create(self, request: Mapping[str, Any]) -> None:
        """Start a job.

        Raises:
            ConfigError: SageMaker doesn't take it.
        """
        with told():
            self.jobs.create_training_job(**request)

    def create_tuning_job(self, request: Mapping[str, Any]) -> None:
        """Start a tuning job.

        Raises:
            ConfigError: SageMaker doesn't take it.
        """
        with told():
            self.jobs.create_hyper_parameter_tuning_job(**request)

    def describe_tuning_job(self, name: str) -> dict[str, Any]:
        """Everything that SageMaker says of a tuning job."""
        with told():
            found: dict[str, Any] = self.jobs.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
        return found

    def refuse_second_job(self, request: Mapping[str, Any]) -> None:
        """Two jobs of one run would write into the same checkpoints.

        Raises:
            ConfigError: another one still runs.
        """
        from botocore.exceptions import ClientError

        name, place = request["TrainingJobName"], request["CheckpointConfig"]["S3Uri"]
        same = re.sub(r"-\d{8}-\d{6}-\d{3}$", "", name)
        try:
            with told(ClientError):
                found = self.jobs.list_training_jobs(StatusEquals="InProgress", NameContains=same, MaxResults=20)
                for each in found["TrainingJobSummaries"]:
                    other = self.describe(each["TrainingJobName"])
                    if other.get("CheckpointConfig", {}).get("S3Uri") == place and not _over(other):
                        raise ConfigError(
                            f"launch: the job {each['TrainingJobName']} of the same run is still at work, and both "
                            f"would write to {place}. Stop it, or choose another name (run.name)."
                        )
        except ClientError:  # who may start jobs may not be allowed to list them
            return

    def knows(self, name: str) -> bool:
        """Whether there is, or was, a job of this name."""
        from botocore.exceptions import ClientError

        try:
            with told(ClientError):
                self.jobs.describe_training_job(TrainingJobName=name)
        except ClientError as error:
            said = error.response.get("Error", {})
            if re.search(r"not (be )?f(ou|i)nd", str(said.get("Message", ""))):
                return False
            with told():
                raise
        return True

    def describe(self, name: str) -> dict[str, Any]:
        """Everything that SageMaker says of a job."""
        with told():
            found: dict[str, Any] = self.jobs.describe_training_job(TrainingJobName=name)
        return found

    def stop(self, name: str) -> None:
        """Ask SageMaker to end a job; it sends SIGTERM and waits two minutes."""
        with told():
            self.jobs.stop_training_job(TrainingJobName=name)

    def log_streams(self, name: str) -> list[str]:
        """The names of a job's logs, one per host; empty until it writes."""
        from botocore.exceptions import ClientError

        try:
            with told(ClientError):
                pages = self._logs.get_paginator("describe_log_streams").paginate(
                    logGroupName=_LOGS, logStreamNamePrefix=f"{name}/"
                )
                return [str(stream["logStreamName"]) for page in pages for stream in page.get("logStreams", [])]
        except ClientError:  # no such group yet, or not allowed
            return []

    def log_lines(self, stream: str, token: str | None) -> tuple[list[str], str | None]:
        """The next lines of a log, and from where to go on."""
        from botocore.exceptions import ClientError

        more = {} if token is None else {"nextToken": token}
        try:
            with told(ClientError):
                found = self._logs.get_log_events(logGroupName=_LOGS, logStreamName=stream, startFromHead=True, **more)
        except ClientError:
            return [], token
        return [str(event["message"]) for event in found["events"]], found.get("nextForwardToken", token)


class SubmittedJob(LaunchedJob):
    """A job that SageMaker has; asked about at most every ten seconds, since it answers only so often."""

    def __init__(
        self,
        job: LaunchJob,
        name: str,
        services: Services,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.name = name
        self._services, self._now = services, now
        self._asked = -_PATIENCE_S
        self._known = Status(state=State.waiting)

    @property
    def handle(self) -> str:
        """The name that SageMaker knows it by."""
        return self.name

    def status(self) -> Status:
        if not self._known.state.over and self._now() - self._asked >= _PATIENCE_S:
            self._asked = self._now()
            self._known = status_of(self._services.describe(self.name))
        return self._known

    def stop(self) -> None:
        if not self.status().state.over:
            self._services.stop(self.name)


_PATIENCE_S = 10.0


def status_of(described: Mapping[str, Any]) -> Status:
    """How a job does, from SageMaker's description."""
    state = _STATES.get(str(described["TrainingJobStatus"]), State.running)
    second = str(described.get("SecondaryStatus", ""))
    if state is State.running and second in _BEFORE_START:
        state = State.waiting
    metrics = {str(each["MetricName"]): float(each["Value"]) for each in described.get("FinalMetricDataList", [])}
    reason = first_line(str(described.get("FailureReason", "")))
    return Status(state=state, detail=reason if state is State.failed else second, metrics=metrics)


def first_line(reason: str) -> str:
    """Of what SageMaker says of a failure, the line that says why."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return next((line for line in lines if "ConfigError:" in line or "TrainingError:" in line), (lines or [""])[0])


def console_link(name: str, region: str) -> str:
    """Where a person can look at a job."""
    domain = {"cn": "amazonaws.cn", "us-gov": "amazonaws-us-gov.com"}
    ends = next((end for start, end in domain.items() if region.startswith(f"{start}-")), "aws.amazon.com")
    return f"https://{region}.console.{ends}/sagemaker/home?region={region}#/jobs/{plain_name(name)}"


def session_in(region: str | None, launcher: str) -> tuple[Any, Any]:
    """boto3's session and the settings of its clients, for a launcher of AWS.

    Args:
        region: None: as AWS's configuration says.
        launcher: its name, for people.

    Raises:
        ConfigError: there is no boto3, or no region.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ConfigError(
            f"launch: boto3 isn't installed, which launcher={launcher} needs. pip install 'shardwright[aws]' "
            "(launcher)."
        ) from error
    with told():
        session = boto3.session.Session(region_name=region)
    if session.region_name is None:
        raise ConfigError(
            "launch: which region? Name one, as in launcher.region=us-east-1, or set AWS_DEFAULT_REGION "
            "(launcher.region)."
        )
    return session, Config(retries={"mode": "standard", "max_attempts": 8}, user_agent_extra="shardwright")


@contextmanager
def told(*through: type[Exception]) -> Iterator[None]:
    """What boto3 raises becomes one line.

    Args:
        through: what the caller deals with.

    Raises:
        ConfigError: no credentials, not allowed, not there, not taken.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except through:
        raise
    except ClientError as error:
        said = error.response.get("Error", {})
        code, message = str(said.get("Code", "")), " ".join(str(said.get("Message", "")).split()).rstrip(".")
        fix = next((fix for word, fix in _FIXES.items() if word in code), "See what it says")
        raise ConfigError(f"launch: AWS refuses {error.operation_name}: {code}: {message}. {fix}.") from error
    except BotoCoreError as error:
        message = " ".join(str(error).split()).rstrip(".")
        fix = "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if "redential" in message else ""
        raise ConfigError(
            f"launch: AWS can't be asked: {message}. {fix or 'Look at the network and the region'}."
        ) from error


_FIXES = {
    "AccessDenied": "Your own rights lack it; ask whoever manages the account",
    "ResourceLimitExceeded": "Ask for a higher quota in Service Quotas, or take another type (launcher.instance_type)",
    "ExpiredToken": "Log in again",
    "UnrecognizedClient": "Look at your credentials",
    "InvalidClientTokenId": "Look at your credentials",
    "NoSuchBucket": "Make the bucket, or name another (launcher.bucket)",
}


def _over(described: Mapping[str, Any]) -> bool:
    return status_of(described).state.over
