"""Jobs of AWS Batch: requests field by field, what the service answers, and settings that make no job."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.launch.service import Service, aws, service_process
from trainer.commands import COMMANDS
from trainer.commands.launch import SCRIPT
from trainer.launch import BatchLauncher, LaunchJob, State
from trainer.launch.batch_follow import Watch
from trainer.launch.batch_job import BatchJob, Services, command_code, exit_code_of, status_of
from trainer.launch.batch_request import job_name
from trainer.launch.following import follow_until_end
from trainer.metrics.screen import PlainScreen

__all__ = ["aws", "service_process"]

IMAGE = "registry.example.com/shardwright:1.0"
NEEDED = ("launcher=batch", "launcher.queue=training", f"launcher.image={IMAGE}", "launcher.region=us-east-1",
          "launcher.instance_type=p4d.24xlarge")  # fmt: skip
TINY = ("model=llama_tiny", "trainer.max_steps=2", "run.name=first_run")
JOB = LaunchJob(name="first_run", script=SCRIPT, overrides=TINY)
SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:hub"
ROLE = "arn:aws:iam::123456789012:role/training"
STOPPED = "stopped by shardwright"
STEPS = ("started", "step=1/2 loss=5.5 lr=0.001", "step=2/2 loss=5.4 lr=0.001", "step=2 val_loss=5.3")


def launch(*words: str) -> int:
    """As the command does it, in this process."""
    from trainer.cli import exit_code

    options = COMMANDS["launch"].parse([*NEEDED, *words])
    return exit_code(lambda: COMMANDS["launch"].run(options))


def checked(*words: str, **settings: Any) -> BatchLauncher:
    launcher = BatchLauncher(
        **{"queue": "training", "image": IMAGE, "instance_type": "p4d.24xlarge", "region": "us-east-1", **settings}
    )
    launcher.check([LaunchJob(name="first_run", script=SCRIPT, overrides=words)])
    return launcher


def told(service: Service, *descriptions: dict[str, Any], main: dict[str, Any] | None = None) -> None:
    """The job is described like this, one after the other, the last one for good; its main node has a log."""
    left = list(descriptions)
    node = {"status": "RUNNING", "container": {"logStreamName": "stream"}} | (main or {})

    def describe(asked: dict[str, Any]) -> dict[str, Any]:
        [number] = asked["jobs"]
        if "#" in number:
            return {"jobs": [{"jobId": number, **node}]}
        found = left.pop(0) if len(left) > 1 else left[0]
        return {"jobs": [{"jobId": number, "nodeProperties": {"mainNode": 0}, **found}]}

    service.answers["describejobs"] = describe
    service.answers["submitjob"] = lambda asked: {"jobId": "job-1", "jobName": asked["jobName"]}
    service.answers["listjobs"] = lambda asked: {"jobSummaryList": []}
    service.answers["terminatejob"] = lambda asked: {}
    events = [{"timestamp": number, "message": line, "ingestionTime": 0} for number, line in enumerate(STEPS)]
    service.answers["GetLogEvents"] = lambda asked: {
        "events": [] if asked.get("nextToken") == "end" else events, "nextForwardToken": "end",
    }  # fmt: skip


def test_two_nodes_are_asked_for_as_it_was_said(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    told(aws, {"status": "RUNNABLE"}, {"status": "RUNNING"}, {"status": "SUCCEEDED"})
    words = [
        *("launcher.nodes=2", "launcher.volumes.fsx={host:/fsx,path:/fsx}", "launcher.run_root=/fsx/runs"),
        "launcher.volumes.home={efs:fs-0123456789abcdef0,path:/home/me,root:/me,read_only:true}",
        *(f"launcher.job_role={ROLE}", f"launcher.execution_role={ROLE}", f"launcher.secrets.HF_TOKEN={SECRET}"),
        *("launcher.environment.LEVEL=3", "launcher.tags.team=nlp", "launcher.max_run=2h", "launcher.restarts=2"),
        *("launcher.share=nlp", "launcher.priority=5", "launcher.log_group=/mine", "launcher.shared_memory_gib=100"),
    ]
    assert launch(*words, *TINY) == 0
    [definition] = aws.asked("registerjobdefinition")
    [submission] = aws.asked("submitjob")
    name = definition.pop("jobDefinitionName")
    assert re.fullmatch(r"shardwright-[0-9a-f]{16}", name)
    devices = [
        {"hostPath": f"/dev/infiniband/uverbs{number}", "containerPath": f"/dev/infiniband/uverbs{number}",
         "permissions": ["READ", "WRITE", "MKNOD"]}
        for number in range(4)
    ]  # fmt: skip
    variables = {
        "PYTHONUNBUFFERED": "1", "SHARDWRIGHT_GRACE_S": "30", "TORCH_NCCL_TRACE_BUFFER_SIZE": "20000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "FI_EFA_USE_HUGE_PAGE": "0", "LEVEL": "3",
    }  # fmt: skip
    container = {
        "image": IMAGE,
        "command": ["shardwright", "node", "--help"],
        "environment": [{"name": key, "value": value} for key, value in variables.items()],
        "resourceRequirements": [
            {"type": "VCPU", "value": "96"},
            {"type": "MEMORY", "value": str(1152 * 9 // 10 * 1024)},
            {"type": "GPU", "value": "8"},
        ],
        "linuxParameters": {"sharedMemorySize": 102400, "devices": devices},
        "ulimits": [{"name": "memlock", "softLimit": -1, "hardLimit": -1}],
        "instanceType": "p4d.24xlarge",
        "jobRoleArn": ROLE,
        "executionRoleArn": ROLE,
        "secrets": [{"name": "HF_TOKEN", "valueFrom": SECRET}],
        "volumes": [
            {"name": "fsx", "host": {"sourcePath": "/fsx"}},
            {
                "name": "home",
                "efsVolumeConfiguration": {
                    "fileSystemId": "fs-0123456789abcdef0", "rootDirectory": "/me", "transitEncryption": "ENABLED",
                },
            },
        ],
        "mountPoints": [
            {"sourceVolume": "fsx", "containerPath": "/fsx", "readOnly": False},
            {"sourceVolume": "home", "containerPath": "/home/me", "readOnly": True},
        ],
        "logConfiguration": {"logDriver": "awslogs", "options": {"awslogs-group": "/mine"}},
    }  # fmt: skip
    assert definition == {
        "type": "multinode",
        "nodeProperties": {
            "numNodes": 2, "mainNode": 0, "nodeRangeProperties": [{"targetNodes": "0:", "container": container}],
        },
        "platformCapabilities": ["EC2"],
        "retryStrategy": {
            "attempts": 3,
            "evaluateOnExit": [{"onExitCode": "2", "action": "EXIT"}, {"onReason": "*", "action": "RETRY"}],
        },
        "propagateTags": True,
        "tags": {"team": "nlp"},
        "timeout": {"attemptDurationSeconds": 7200},
        "schedulingPriority": 5,
    }  # fmt: skip
    assert re.fullmatch(r"first_run-\d{8}-\d{6}-\d{3}", submission.pop("jobName"))
    command = ["shardwright", "node", "--processes=8", *TINY, "run.dir=/fsx/runs/first_run"]
    assert submission == {
        "jobQueue": "training",
        "jobDefinition": name,
        "nodeOverrides": {"nodePropertyOverrides": [{"targetNodes": "0:", "containerOverrides": {"command": command}}]},
        "shareIdentifier": "nlp",
        "schedulingPriorityOverride": 5,
    }
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [
        "job job-1",
        "https://us-east-1.console.aws.amazon.com/batch/home?region=us-east-1#jobs/detail/job-1",
    ]
    assert [line for line in out.splitlines() if line in STEPS] == list(STEPS)
    assert "runnable" in out
    assert out.splitlines()[-1] == "finished"
    assert "EFA: the compute environment needs" in err


def test_one_node_is_an_ordinary_job_and_shares_its_definition(aws: Service) -> None:
    told(aws, {"status": "SUCCEEDED", "nodeProperties": {"mainNode": 0}})
    words = ["launcher.instance_type=g5.xlarge", "launcher.restarts=0"]
    assert launch(*words, *TINY) == 0
    assert launch(*words, *TINY, "optimizer.lr=1e-3") == 0
    [definition] = aws.asked("registerjobdefinition")
    one, two = aws.asked("submitjob")
    assert definition["type"] == "container"
    assert definition["retryStrategy"] == {"attempts": 1}
    assert "instanceType" not in definition["containerProperties"], "such a job has none"
    assert "devices" not in definition["containerProperties"]["linuxParameters"]
    assert one["jobDefinition"] == two["jobDefinition"] == definition["jobDefinitionName"]
    assert two["containerOverrides"]["command"][-1] == "optimizer.lr=1e-3"
    assert "nodeOverrides" not in one


def test_second_job_beside_one_that_runs_is_refused(aws: Service, capsys: pytest.CaptureFixture[str]) -> None:
    told(aws, {"status": "RUNNING"})
    running = {"jobId": "job-0", "jobName": "first_run-20261122-050403-021"}
    other = {"jobId": "job-9", "jobName": "first_run-2-20261122-050403-021"}
    aws.answers["listjobs"] = lambda asked: {
        "jobSummaryList": [other, running] if asked["jobStatus"] == "RUNNABLE" else [other]
    }
    assert launch(*TINY) == 2
    assert "the job first_run-20261122-050403-021 of the same run is still at work" in capsys.readouterr().err
    assert aws.asked("submitjob") == []


@pytest.mark.parametrize(
    ("whole", "main", "state", "code", "detail"),
    [
        ({"status": "RUNNABLE", "statusReason": "no\n capacity"}, {}, State.waiting, 1, "no capacity"),
        ({"status": "RUNNING", "attempts": [{}]}, {}, State.running, 1, "started again 1 times"),
        ({"status": "SUCCEEDED"}, {"container": {"exitCode": 0}}, State.finished, 0, ""),
        (
            {"status": "FAILED", "statusReason": "Essential container in task exited"},
            {"container": {"exitCode": 2}}, State.failed, 2, "Essential container in task exited (exit code 2)",
        ),
        ({"status": "FAILED"}, {"container": {"exitCode": 75}}, State.stopped, 75, "(exit code 75)"),
        ({"status": "FAILED", "statusReason": STOPPED}, {}, State.stopped, 75, STOPPED),
        ({"status": "FAILED", "statusReason": "Host EC2 terminated"}, {}, State.failed, 1, "Host EC2 terminated"),
        ({"status": "FAILED"}, {"container": {"exitCode": 137, "reason": "OutOfMemoryError"}}, State.failed, 1,
         "OutOfMemoryError (exit code 137)"),
    ],
)  # fmt: skip
def test_status_and_code_are_those_of_the_main_node(
    whole: dict[str, Any], main: dict[str, Any], state: State, code: int, detail: str
) -> None:
    found = status_of(whole, main)
    assert (found.state, found.detail) == (state, detail)
    assert command_code(found, exit_code_of(whole, main)) == code


def test_job_of_a_sweep_is_found_again_tells_its_numbers_and_is_stopped(aws: Service) -> None:
    told(aws, {"status": "RUNNING"})
    launcher = checked(nodes=2)
    started = launcher.start(JOB)
    found = launcher.find(JOB, started.handle)
    assert isinstance(found, BatchJob)
    status = found.status()
    assert status.state is State.running
    assert status.metrics == {"step": 2.0, "loss": 5.4, "lr": 0.001, "val_loss": 5.3}
    assert found.status() is status, "asked at most every ten seconds"
    found.stop()
    [asked] = aws.asked("terminatejob")
    assert asked == {"jobId": "job-1", "reason": STOPPED}
    aws.answers["describejobs"] = lambda asked: {"jobs": []}
    assert launcher.find(JOB, started.handle) is None
    for each in (started, found):
        each.services.close()  # type: ignore[attr-defined]


def test_ctrl_c_asks_and_a_stop_terminates_the_job(aws: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    told(
        aws,
        {"status": "RUNNING"},
        {"status": "RUNNING"},
        {"status": "FAILED", "statusReason": STOPPED},
    )
    services, stream, answers = Services("us-east-1"), io.StringIO(), iter([False, True])
    interruptions = iter([True, True])

    class Impatient(Watch):
        def pause(self, wait_s: float) -> None:
            if next(interruptions, False):
                raise KeyboardInterrupt

    def follow() -> int:
        watch = Impatient(BatchJob(JOB, "job-1", services), PlainScreen(stream))
        return follow_until_end(watch, lambda question: next(answers))

    assert follow() == 130
    assert "aws batch terminate-job --region us-east-1 --job-id job-1 --reason stop" in stream.getvalue()
    assert follow() == 75
    assert len(aws.asked("terminatejob")) == 1
    services.close()


def test_request_is_what_boto3_takes_and_a_changed_one_is_not() -> None:
    """botocore knows the service's names and types."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("batch")

    def report(action: str, request: dict[str, Any]) -> str:
        found: str = ParamValidator().validate(request, model.operation_model(action).input_shape).generate_report()
        return found

    def in_container(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        changed: dict[str, Any] = json.loads(json.dumps(definition))
        change(changed["nodeProperties"]["nodeRangeProperties"][0]["container"])
        return changed

    volumes = {"home": {"efs": "fs-01234567", "path": "/home"}, "fsx": {"host": "/fsx", "path": "/fsx"}}
    launcher = checked(nodes=2, volumes=volumes, max_run="2h", log_group="/mine", tags={"a": "b"}, job_role=ROLE)
    definition, submission = launcher.requests(JOB)
    assert report("RegisterJobDefinition", definition) == ""
    assert report("SubmitJob", submission) == ""
    single, alone = checked(instance_type="g5.xlarge").requests(JOB)
    assert report("RegisterJobDefinition", single) == ""
    assert report("SubmitJob", alone) == ""
    key = in_container(lambda container: container.update(ulimit=container.pop("ulimits")))
    assert 'Unknown parameter in nodeProperties.nodeRangeProperties[0].container: "ulimit"' in report(
        "RegisterJobDefinition", key
    )
    wrong = in_container(lambda container: container["linuxParameters"].update(sharedMemorySize="1Gi"))
    assert "Invalid type for parameter nodeProperties" in report("RegisterJobDefinition", wrong)
    assert "Unknown parameter" in report("SubmitJob", {**submission, "nodeOverride": {}})
    assert "Invalid type" in report("SubmitJob", {**submission, "nodeOverrides": {"numNodes": "2"}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queue": None}, "which queue?"),
        ({"queue": "a queue"}, "is no name or ARN of a job queue"),
        ({"image": None}, "which image?"),
        ({"instance_type": None}, "no instance type is given"),
        ({"instance_type": "ml.p4d.24xlarge"}, "Leave ml. out"),
        ({"instance_type": "p4d"}, "no type of EC2's"),
        ({"instance_type": "x9.large", "gpus": 0}, "what x9.large has isn't known here. Say it (launcher.vcpus)"),
        ({"instance_type": "x9.large", "gpus": 0, "vcpus": 8}, "launcher.memory_gib"),
        ({"nodes": 0}, "nodes=0"),
        ({"restarts": 10}, "restarts=10 is not in 0 to 9"),
        ({"gpus": 16}, "gpus=16, and p4d.24xlarge has 8"),
        ({"instance_type": "g5.xlarge", "efa": 1}, "efa=1, and g5.xlarge has no EFA"),
        ({"vcpus": 97}, "vcpus=97, and p4d.24xlarge has 96"),
        ({"memory_gib": 2000}, "memory_gib=2000, and p4d.24xlarge has 1152"),
        ({"shared_memory_gib": 1100}, "leaves none"),
        ({"processes": 16}, "processes=16, and a node has 8 GPUs"),
        ({"job_role": "training"}, "job_role=training is no role's ARN"),
        ({"secrets": {"HF_TOKEN": "hf_12345678"}, "execution_role": ROLE}, "HF_TOKEN is read from where?"),
        ({"secrets": {"HF_TOKEN": SECRET}}, "none is given. Give its ARN (launcher.execution_role)"),
        ({"environment": {"HF_TOKEN": "hf_12345678"}}, "launcher.secrets.HF_TOKEN"),
        ({"environment": {"AWS_BATCH_X": "1"}}, "AWS_BATCH_X is set in the job by itself"),
        ({"tags": {"aws:x": "y"}}, "the tag aws:x=y isn't taken"),
        ({"max_run": "30s"}, "below a minute"),
        ({"priority": 5}, "launcher.share"),
        ({"volumes": {"a": "fsx:/x"}}, "is no volume"),
        ({"volumes": {"a": {"host": "/x", "efs": "fs-01234567", "path": "/x"}}}, "host or efs, one of both"),
        ({"volumes": {"a": {"host": "x", "path": "/x"}}}, "isn't written from / on"),
        ({"volumes": {"a": {"host": "/x", "root": "/y", "path": "/x"}}}, "root is a folder of EFS"),
        ({"volumes": {"a": {"efs": "mine", "path": "/x"}}}, "is no file system"),
        ({"volumes": {"a": {"host": "/x"}}}, "where in the container"),
        ({"volumes": {"a": {"host": "/x", "paths": "/y"}}}, "a volume has no 'paths'"),
        ({"volumes": {"a": {"host": "/x", "path": "/y", "read_only": 1}}}, "1 is no bool"),
        ({"volumes": {"a": {"host": "/x", "path": "/y"}, "b": {"host": "/z", "path": "/y"}}}, "two volumes at /y"),
        ({"run_root": "/fsx"}, "lies on no volume"),
        ({"run_root": "fsx"}, "isn't written from / on"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(**settings)
    assert said in str(error.value)
    assert str(error.value).startswith("launch: ")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(").")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--cfg", "--cfg can't go along"),
        ("data.path=Ref::x", "puts something else in the place of Ref::"),
        ("run.note=" + "x" * 8000, "the job's words have 8009 characters"),
    ],
)
def test_wrong_word_is_refused_in_one_line(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(word)
    assert said in str(error.value)


def test_dry_run_prints_both_requests_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", "checkpoint.folder=ftp://me:pass12345@files/run", *TINY) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown.keys() == {"RegisterJobDefinition", "SubmitJob"}
    assert "pass12345" not in out + err
    assert "checkpoint.folder: whoever may describe the job can read it" in err


def test_launch_without_boto3_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)
    assert launch(*TINY) == 2
    assert "pip install 'shardwright[aws]'" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["a", "llama_tiny-02b7bc", "x" * 200, "..odd..", "ü"])
def test_job_name_has_the_service_s_form(run: str) -> None:
    name = job_name(run, datetime(2026, 11, 22, 5, 4, 3, 21000, tzinfo=UTC))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", name)
    assert name.endswith("-20261122-050403-021")
