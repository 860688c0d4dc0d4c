"""What is asked of AWS Batch and CloudWatch's logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from strategies.errors import ConfigError
from trainer.launch.base import LaunchedJob, LaunchJob, State, Status
from trainer.launch.following import newest_numbers
from trainer.launch.sagemaker_job import session_in, told
from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

_STATES = {"SUCCEEDED": State.finished, "FAILED": State.failed, "RUNNING": State.running}
_PENDING = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
_PATIENCE_S = 10.0
_LOGS = "/aws/batch/job"
_TAIL = 200
"""Lines of a log that are looked through for the newest numbers."""
_SUFFIX = len("-20261122-050403-021")
_REASON = "stopped by shardwright"


class Services:
    """Batch and CloudWatch's logs in one region.

    Args:
        region: None: as AWS's configuration says.

    Raises:
        ConfigError: there is no boto3, or no region.
    """

    def __init__(self, region: str | None) -> None:
        session, settings = session_in(region, "batch")
        self.region: str = session.region_name
        with told():
            self._batch = session.client("batch", config=settings)
            self._logs = session.client("logs", config=settings)

    def close(self) -> None:
        """Let go of the connections."""
        for client in (self._batch, self._logs):
            client.close()

    def define(self, definition: Mapping[str, Any]) -> None:
        """Register a definition, unless it is there: its name is made from what it holds.

        Raises:
            ConfigError: Batch doesn't take it.
        """
        with told():
            found = self._batch.describe_job_definitions(
                jobDefinitionName=definition["jobDefinitionName"], status="ACTIVE"
            )
            if not found["jobDefinitions"]:
                self._batch.register_job_definition(**definition)

    def submit(self, request: Mapping[str, Any]) -> str:
        """Start a job; its number.

        Raises:
            ConfigError: Batch doesn't take it.
        """
        with told():
            return str(self._batch.submit_job(**request)["jobId"])

    def describe(self, number: str) -> dict[str, Any] | None:
        """Everything that Batch says of a job; None: it knows none of this number."""
        with told():
            found: list[dict[str, Any]] = self._batch.describe_jobs(jobs=[number])["jobs"]
        return found[0] if found else None

    def stop(self, number: str) -> None:
        """Ask Batch to end a job, whether it runs or waits."""
        with told():
            self._batch.terminate_job(jobId=number, reason=_REASON)

    def refuse_second_job(self, request: Mapping[str, Any]) -> None:
        """Two jobs of one run would write into the same checkpoints.

        Raises:
            ConfigError: another one is still at work.
        """
        from botocore.exceptions import ClientError

        name = request["jobName"]
        same = name[:-_SUFFIX]
        try:
            with told(ClientError):
                for status in _PENDING:
                    pages = self._batch.get_paginator("list_jobs").paginate(
                        jobQueue=request["jobQueue"], jobStatus=status
                    )
                    for each in (each for page in pages for each in page["jobSummaryList"]):
                        if str(each["jobName"])[:-_SUFFIX] == same:
                            raise ConfigError(
                                f"launch: the job {each['jobName']} of the same run is still at work, and both would "
                                "write to the same folder. Stop it, or choose another name (run.name)."
                            )
        except ClientError:  # who may submit jobs may not be allowed to list them
            return

    def log_lines(
        self, group: str, stream: str, token: str | None, *, from_start: bool = True
    ) -> tuple[list[str], str | None]:
        """The next lines of a log, and from where to go on; the last ones if not from the start."""
        from botocore.exceptions import ClientError

        more: dict[str, Any] = {"startFromHead": True} if from_start else {"limit": _TAIL}
        more |= {} if token is None else {"nextToken": token}
        try:
            with told(ClientError):
                found = self._logs.get_log_events(logGroupName=group, logStreamName=stream, **more)
        except ClientError:  # not there yet, or not allowed
            return [], token
        return [str(event["message"]) for event in found["events"]], found.get("nextForwardToken", token)


class BatchJob(LaunchedJob):
    """A job that Batch has; asked about at most every ten seconds."""

    def __init__(
        self, job: LaunchJob, number: str, services: Services, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.job = job
        self.number = number
        self.services, self._now = services, now
        self._asked = -_PATIENCE_S
        self._known = Status(state=State.waiting)

    @property
    def handle(self) -> str:
        """Its number at Batch."""
        return self.number

    def status(self) -> Status:
        if not self._known.state.over and self._now() - self._asked >= _PATIENCE_S:
            self._asked = self._now()
            whole, main = self.look()
            found, place = status_of(whole, main), log_of(main)
            numbers = {}
            if found.state is not State.waiting and place is not None:
                numbers = newest_numbers(self.services.log_lines(*place, None, from_start=False)[0])
            self._known = Status(state=found.state, detail=found.detail, metrics={**self._known.metrics, **numbers})
        return self._known

    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What Batch says of the job, and of its main node.

        Raises:
            ConfigError: it doesn't know the job any more.
        """
        whole = self.services.describe(self.number)
        if whole is None:
            raise ConfigError(f"launch: AWS Batch knows no job {self.number} (launcher.region).")
        if "nodeProperties" not in whole:
            return whole, whole
        main = whole["nodeProperties"].get("mainNode", 0)
        return whole, self.services.describe(f"{self.number}#{main}") or {}

    def stop(self) -> None:
        if not self.status().state.over:
            self.services.stop(self.number)


def status_of(whole: Mapping[str, Any], main: Mapping[str, Any]) -> Status:
    """How a job does, from Batch's description of it and of its main node."""
    state = _STATES.get(str(whole["status"]), State.waiting)
    reason = " ".join(str(whole.get("statusReason") or "").split())
    if state is State.failed:
        code = exit_code_of(whole, main)
        why = str(main.get("container", {}).get("reason") or reason)
        stopped = code == EXIT_STOPPED or _REASON in reason
        detail = f"{why} (exit code {code})".strip() if code else why
        return Status(state=State.stopped if stopped else state, detail=detail)
    attempts = len(whole.get("attempts", []))
    again = f"started again {attempts} times" if attempts and state is State.running else ""
    return Status(state=state, detail=again or (reason if state is State.waiting else ""))


def exit_code_of(whole: Mapping[str, Any], main: Mapping[str, Any]) -> int | None:
    """Of the main node's last attempt; None: it never ended by itself."""
    ends = [main.get("container", {}), *(attempt.get("container", {}) for attempt in main.get("attempts", [])[::-1])]
    ends.append(whole.get("container", {}))
    return next((int(end["exitCode"]) for end in ends if end.get("exitCode") is not None), None)


def command_code(status: Status, code: int | None) -> int:
    """What the command answers with when a job has ended so."""
    if status.state is State.finished:
        return 0
    if status.state is State.stopped:
        return EXIT_STOPPED
    return EXIT_WRONG_INPUT if code == EXIT_WRONG_INPUT else 1


def log_of(node: Mapping[str, Any]) -> tuple[str, str] | None:
    """Group and stream of a node's log; None: it has none yet."""
    container = node.get("container", {})
    stream = container.get("logStreamName")
    options = container.get("logConfiguration", {}).get("options", {})
    return None if not stream else (options.get("awslogs-group", _LOGS), stream)
