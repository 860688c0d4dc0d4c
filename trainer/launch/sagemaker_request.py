"""A job as SageMaker's API takes it: pure functions, which send nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.launch.sagemaker_limits import MOST_HYPERPARAMETERS, has_efa, instance_type
from trainer.launch.sagemaker_parts import Distribution, channel, today
from trainer.sagemaker.hyperparameters import packed
from trainer.sagemaker.metric_definitions import as_request, metric_definitions
from trainer.stop import seconds

if TYPE_CHECKING:
    from trainer.launch.sagemaker import SageMakerLauncher

INSIDE = "/opt/ml"
CHECKPOINTS = f"{INSIDE}/checkpoints"
_LONGEST_NAME = 63


def training_job(
    settings: SageMakerLauncher,
    *,
    run: str,
    words: Sequence[str],
    script: str,
    code: str,
    now: datetime,
    by_toolkit: bool = False,
) -> dict[str, Any]:
    """The request CreateTrainingJob.

    Args:
        settings: checked ones.
        run: its name; jobs with the same one go on from each other's checkpoints.
        words: `key=value`, for the script.
        script: in the archive.
        code: address of the folder in S3 that holds the archive and its starter.
        now: makes the job's name unique.
        by_toolkit: SageMaker's toolkit in the image starts the processes, also with torchrun.
    """
    by_toolkit = by_toolkit or today(settings.distribution) is not Distribution.torchrun
    seconds_in_all = whole_seconds(settings.max_run, "launcher.max_run")
    stopping = {"MaxRuntimeInSeconds": seconds_in_all}
    if settings.spot:
        stopping["MaxWaitTimeInSeconds"] = max_wait_s(settings)
    request: dict[str, Any] = {
        "TrainingJobName": job_name(run, now),
        "RoleArn": settings.role,
        "AlgorithmSpecification": _algorithm(settings, by_toolkit),
        "HyperParameters": _hyperparameters(settings, words, script, code, by_toolkit),
        "InputDataConfig": _channels(settings, code),
        "OutputDataConfig": _output(settings, run),
        "ResourceConfig": _resources(settings),
        "StoppingCondition": stopping,
        "CheckpointConfig": {"S3Uri": checkpoints_of(settings, run), "LocalPath": CHECKPOINTS},
        "Environment": _environment(settings, script, by_toolkit),
        "EnableManagedSpotTraining": settings.spot,
        "EnableNetworkIsolation": settings.network.isolated,
        "EnableInterContainerTrafficEncryption": settings.network.encrypted,
        "Tags": [{"Key": name, "Value": value} for name, value in settings.tags.items()],
    }
    if settings.retries is not None:
        request["RetryStrategy"] = {"MaximumRetryAttempts": settings.retries}
    if settings.network.subnets:
        groups, subnets = list(settings.network.security_groups), list(settings.network.subnets)
        request["VpcConfig"] = {"SecurityGroupIds": groups, "Subnets": subnets}
    return request


def plain_name(text: str) -> str:
    """With the characters that names of jobs have."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "run"


def job_name(run: str, now: datetime) -> str:
    """The run's, and the time."""
    suffix = f"-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"
    return plain_name(run)[: _LONGEST_NAME - len(suffix)].strip("-") + suffix


def of_run(settings: SageMakerLauncher, run: str) -> str:
    """The place in S3 of everything that a run writes."""
    return f"{settings.place}/{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', run)}"


def checkpoints_of(settings: SageMakerLauncher, run: str) -> str:
    """Where its checkpoints are; the same for each of its jobs."""
    return f"{of_run(settings, run)}/checkpoints"


def whole_seconds(text: str, key: str) -> int:
    """Of a duration such as `2h`.

    Raises:
        ConfigError: it is none.
    """
    found = seconds(text, key)
    assert found is not None
    return max(1, round(found))


def max_wait_s(settings: SageMakerLauncher) -> int:
    """How long a spot job may take with all its waiting."""
    if settings.max_wait is not None:
        return whole_seconds(settings.max_wait, "launcher.max_wait")
    return 2 * whole_seconds(settings.max_run, "launcher.max_run")


def metrics_of(settings: SageMakerLauncher) -> dict[str, str]:
    """Ours, and those that the user adds."""
    return metric_definitions() | dict(settings.metric_definitions)


def _algorithm(settings: SageMakerLauncher, by_toolkit: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "TrainingImage": settings.image,
        "TrainingInputMode": "File",
        "MetricDefinitions": as_request(metrics_of(settings)),
    }
    if not by_toolkit:
        found["ContainerEntrypoint"] = ["/bin/bash"]
        found["ContainerArguments"] = [f"{INSIDE}/input/data/code/start.sh"]
    if settings.registry.vpc:
        found["TrainingImageConfig"] = {"TrainingRepositoryAccessMode": "Vpc"}
        if settings.registry.credentials is not None:
            found["TrainingImageConfig"]["TrainingRepositoryAuthConfig"] = {
                "TrainingRepositoryCredentialsProviderArn": settings.registry.credentials
            }
    return found


def _hyperparameters(
    settings: SageMakerLauncher, words: Sequence[str], script: str, code: str, by_toolkit: bool
) -> dict[str, str]:
    found = {**packed(words), **settings.hyperparameters}
    how = today(settings.distribution)
    if by_toolkit:
        # The toolkit reads JSON. An isolated container can't download: there it finds the archive in the channel.
        archive = f"{INSIDE}/input/data/code" if settings.network.isolated else code
        texts: dict[str, Any] = {
            "sagemaker_program": script,
            "sagemaker_submit_directory": f"{archive}/code.tar.gz",
            "sagemaker_container_log_level": 20,
            "sagemaker_instance_type": instance_type(settings.instance_type),
        }
        if settings.processes is not None:
            texts["sagemaker_mpi_num_of_processes_per_host"] = settings.processes
        if how is Distribution.torchrun:
            texts["sagemaker_torch_distributed_enabled"] = True
        elif how is Distribution.mpi:
            texts["sagemaker_mpi_enabled"] = True
            texts["sagemaker_mpi_custom_mpi_options"] = settings.mpi_options
        else:
            # Without the library's own reduction of gradients, beside which it allows no other process group.
            options = f"-x SMDATAPARALLEL_OPTIMIZE_SDP=true {settings.mpi_options}".strip()
            texts["sagemaker_distributed_dataparallel_enabled"] = True
            texts["sagemaker_distributed_dataparallel_custom_mpi_options"] = options
        found |= {name: json.dumps(value) for name, value in texts.items()}
    if len(found) > MOST_HYPERPARAMETERS:
        raise ConfigError(
            f"launch: {len(found)} hyperparameters, SageMaker takes {MOST_HYPERPARAMETERS}. Give them as key=value "
            "words, which travel together (launcher.hyperparameters)."
        )
    return found


def _channels(settings: SageMakerLauncher, code: str) -> list[dict[str, Any]]:
    source = {"S3DataType": "S3Prefix", "S3Uri": code, "S3DataDistributionType": "FullyReplicated"}
    ours = {"ChannelName": "code", "DataSource": {"S3DataSource": source}, "InputMode": "File"}
    return [ours, *(channel(name, given).as_request(name) for name, given in settings.channels.items())]


def _output(settings: SageMakerLauncher, run: str) -> dict[str, Any]:
    found = {
        "S3OutputPath": settings.output_place or f"{of_run(settings, run)}/output",
        "CompressionType": "GZIP" if settings.compressed else "NONE",
    }
    return found if settings.output_key is None else {**found, "KmsKeyId": settings.output_key}


def _resources(settings: SageMakerLauncher) -> dict[str, Any]:
    found: dict[str, Any] = {
        "InstanceType": instance_type(settings.instance_type),
        "InstanceCount": settings.instance_count,
        "VolumeSizeInGB": settings.volume_gb,
    }
    if settings.volume_key is not None:
        found["VolumeKmsKeyId"] = settings.volume_key
    if settings.keep_alive is not None:
        found["KeepAlivePeriodInSeconds"] = whole_seconds(settings.keep_alive, "launcher.keep_alive")
    if settings.training_plan is not None:
        found["TrainingPlanArn"] = settings.training_plan
    return found


def _environment(settings: SageMakerLauncher, script: str, by_toolkit: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    if has_efa(instance_type(settings.instance_type)):
        found["FI_EFA_USE_HUGE_PAGE"] = "0"  # else a fork for data workers may fail for memory
    if settings.efa is not None:
        found["NCCL_NET"] = "AWS Libfabric" if settings.efa else "Socket"  # NCCL fails where that isn't there
    if not by_toolkit:
        found["SHARDWRIGHT_SCRIPT"] = script
        found["SHARDWRIGHT_MAX_RESTARTS"] = str(settings.max_restarts)
        if settings.processes is not None:
            found["SHARDWRIGHT_PROCESSES"] = str(settings.processes)
    else:
        found["PYTHONPATH"] = f"{INSIDE}/code/shardwright"
        if today(settings.distribution) is Distribution.smddp:
            found["SMDATAPARALLEL_OPTIMIZE_SDP"] = "true"
    return found | dict(settings.environment)
