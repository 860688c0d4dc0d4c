"""A sweep as SageMaker's own hyperparameter tuning job, which chooses what to try next and stops what does badly.

The service knows no entry point for the containers of such a job: SageMaker's toolkit in the image starts them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, nearest
from trainer.launch.base import LaunchJob
from trainer.launch.sagemaker_limits import torchrun_takes
from trainer.launch.sagemaker_request import metrics_of, plain_name, training_job
from trainer.launch.space import Categorical, Integer, Parameter, SearchSpace
from trainer.stop import EXIT_STOPPED

if TYPE_CHECKING:
    from trainer.launch.sagemaker import SageMakerLauncher
    from trainer.launch.sagemaker_job import Services

_SHARED = ("RoleArn", "InputDataConfig", "VpcConfig", "OutputDataConfig", "ResourceConfig", "StoppingCondition",
           "EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining",
           "RetryStrategy", "Environment")  # fmt: skip
_MOST_RANGES = 30
_MOST_VALUES = 30
_MOST_ENVIRONMENT = 48
_USUAL_AT_ONCE = 10
_LONGEST_NAME = 32
_OVER = {"Completed": 0, "Stopped": EXIT_STOPPED, "Failed": 1}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the service is to search."""

    space: SearchSpace
    metric: str = "val_loss"
    maximize: bool = False
    trials: int = 20
    """Jobs in all."""
    guided: bool = True
    """What to try next follows from what was found; else it is drawn."""
    stop_bad: bool = True
    """Jobs that do worse than others did are ended."""
    seed: int = 0


def tuning_job(settings: SageMakerLauncher, tuning: Tuning, *, run: str, script: str, code: str, now: datetime) -> Any:
    """The request CreateHyperParameterTuningJob.

    Args:
        settings: checked ones.
        tuning: what is searched.
        run: its name.
        script: in the archive.
        code: address of the archive's folder.
        now: makes the job's name unique.

    Raises:
        ConfigError: the service has nothing like it.
    """
    refuse_unfit(settings, tuning)
    one = training_job(settings, run=run, words=tuning.space.fixed, script=script, code=code, now=now, by_toolkit=True)
    if len(one["Environment"]) > _MOST_ENVIRONMENT:
        raise ConfigError(
            f"launch: {len(one['Environment'])} variables, SageMaker takes {_MOST_ENVIRONMENT} in a tuning job "
            "(launcher.environment)."
        )
    algorithm = one["AlgorithmSpecification"]
    definition = {
        "StaticHyperParameters": one["HyperParameters"],
        "AlgorithmSpecification": {
            key: algorithm[key] for key in ("TrainingImage", "TrainingInputMode", "MetricDefinitions")
        },
        **{key: one[key] for key in _SHARED if key in one},
    }
    suffix = f"-{now:%y%m%d-%H%M%S}"
    at_once = min(tuning.trials, settings.jobs or _USUAL_AT_ONCE)
    return {
        "HyperParameterTuningJobName": plain_name(run)[: _LONGEST_NAME - len(suffix)].strip("-") + suffix,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Bayesian" if tuning.guided else "Random",
            "HyperParameterTuningJobObjective": {
                "Type": "Maximize" if tuning.maximize else "Minimize",
                "MetricName": tuning.metric,
            },
            "ResourceLimits": {"MaxNumberOfTrainingJobs": tuning.trials, "MaxParallelTrainingJobs": at_once},
            "ParameterRanges": ranges(tuning.space.parameters),
            "TrainingJobEarlyStoppingType": "Auto" if tuning.stop_bad else "Off",
            "RandomSeed": tuning.seed,
        },
        "TrainingJobDefinition": definition,
        "Tags": one["Tags"],
    }


def ranges(parameters: Sequence[Parameter]) -> dict[str, list[dict[str, Any]]]:
    """What varies, in the service's form; a range of many values has to be an interval.

    Raises:
        ConfigError: there are more values than it takes.
    """
    found: dict[str, list[dict[str, Any]]] = {
        "ContinuousParameterRanges": [],
        "IntegerParameterRanges": [],
        "CategoricalParameterRanges": [],
    }
    for each in parameters:
        if (values := _values(each)) is not None:
            found["CategoricalParameterRanges"].append({"Name": each.key, "Values": values})
            continue
        assert not isinstance(each, Categorical)
        kind = "Integer" if isinstance(each, Integer) else "Continuous"
        scaling = "Logarithmic" if each.log else "Linear"
        limits = {"MinValue": repr(each.low), "MaxValue": repr(each.high)}
        found[f"{kind}ParameterRanges"].append({"Name": each.key, **limits, "ScalingType": scaling})
    return {kind: members for kind, members in found.items() if members}


def _values(parameter: Parameter) -> list[str] | None:
    """Of a parameter that is one of several values; a range with steps is, for the service."""
    if isinstance(parameter, Categorical):
        values = [_unquoted(value) for value in parameter.values]
    elif isinstance(parameter, Integer) and parameter.step != 1:
        values = [str(value) for value in range(parameter.low, parameter.high + 1, parameter.step)]
    elif not isinstance(parameter, Integer) and parameter.step is not None:
        count = round((parameter.high - parameter.low) / parameter.step)
        values = [repr(parameter.low + number * parameter.step) for number in range(count + 1)]
    else:
        return None
    if len(values) > _MOST_VALUES:
        raise ConfigError(
            f"launch: {parameter.key} has {len(values)} values, a tuning job takes {_MOST_VALUES}. Give an interval, "
            f"or fewer ({parameter.key})."
        )
    return values


def _unquoted(value: str) -> str:
    """A text without the quotes of an override, which are put back in the job."""
    inner = re.fullmatch(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", value)
    return value if inner is None else re.sub(r"\\(['\"])", r"\1", inner[1] if inner[1] is not None else inner[2])


def refuse_unfit(settings: SageMakerLauncher, tuning: Tuning) -> None:
    """What a tuning job doesn't take.

    Raises:
        ConfigError: names it.
    """
    parameters, known = tuning.space.parameters, metrics_of(settings)
    if not 1 <= len(parameters) <= _MOST_RANGES:
        raise ConfigError(
            f"launch: {len(parameters)} keys have several values, a tuning job takes 1 to {_MOST_RANGES}. Write them "
            "as in optimizer.lr=tag(log,interval(1e-4,1e-1)) (--search)."
        )
    for each in parameters:
        if stumbling := torchrun_takes(each.key):
            raise ConfigError(f"launch: torchrun would take --{each.key} for its own {stumbling} ({each.key}).")
        if each.key.startswith("~"):
            raise ConfigError(f"launch: {each.key} takes something away, which has no values ({each.key}).")
    if tuning.metric not in known:
        raise ConfigError(
            f"launch: SageMaker reads no metric {tuning.metric} from the log. {nearest(tuning.metric, known)} Others "
            "come with launcher.metric_definitions (--objective)."
        )
    ranges(parameters)
    if settings.registry.vpc:
        raise ConfigError("launch: a tuning job takes no private registry. Put the image into ECR (launcher.registry).")


def tune(launcher: SageMakerLauncher, script: Path, name: str, tuning: Tuning, *, dry: bool) -> tuple[int, str]:
    """Start a tuning job and follow it, or only show it.

    Returns:
        The exit code, and what to print.
    """
    import sys
    from contextlib import closing

    from trainer.launch.sagemaker_job import Services
    from trainer.secrets import redacted, redacted_words

    job = LaunchJob(name=name, script=script, overrides=tuning.space.fixed)
    launcher.check([job])
    fixed = launcher.words_of(job)
    fixed = redacted_words(fixed) if dry else fixed
    tuning = replace(tuning, space=replace(tuning.space, fixed=tuple(fixed)))
    code = launcher.packed_code(job, for_toolkit=True)
    request = tuning_job(
        launcher, tuning, run=name, script=code.script, code=launcher.place_of(code), now=datetime.now(UTC)
    )
    if dry:
        return 0, json.dumps(redacted(request), indent=1)
    if launcher.spot:
        sys.stderr.write("spot: an interrupted job of a tuning job begins again, they have no checkpoints in common\n")
    with closing(Services(launcher.region)) as services:
        services.put(launcher.place_of(code), {"code.tar.gz": code.archive}, launcher.output_key)
        services.create_tuning_job(request)
        return follow(str(request["HyperParameterTuningJobName"]), services), ""


def follow(name: str, services: Services, every_s: float = 15.0) -> int:
    """Say how the tuning job does until its end; after a Ctrl-C it goes on, and the command that stops it is said."""
    import sys

    before = ""
    sys.stdout.write(f"tuning job {name}\n")
    try:
        while True:
            found = services.describe_tuning_job(name)
            if (line := progress(found)) != before:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
                before = line
            if (status := str(found["HyperParameterTuningJobStatus"])) in _OVER:
                return _OVER[status]
            time.sleep(every_s)
    except KeyboardInterrupt:
        command = "aws sagemaker stop-hyper-parameter-tuning-job"
        sys.stdout.write(
            f"it goes on; to stop it: {command} --region {services.region} --hyper-parameter-tuning-job-name {name}\n"
        )
        return 130


def progress(found: Mapping[str, Any]) -> str:
    """One line: how many jobs did what, and the best so far."""
    counts = found.get("TrainingJobStatusCounters", {})
    names = {"Completed": "completed", "InProgress": "running", "Stopped": "stopped"}
    parts = [f"{counts[key]} {what}" for key, what in names.items() if counts.get(key)]
    failed = counts.get("RetryableError", 0) + counts.get("NonRetryableError", 0)
    parts += [f"{failed} failed"] if failed else []
    if best := found.get("BestTrainingJob"):
        metric = best.get("FinalHyperParameterTuningJobObjectiveMetric", {})
        values = ", ".join(f"{key}={value}" for key, value in sorted(best.get("TunedHyperParameters", {}).items()))
        value = f"{metric['MetricName']} {metric['Value']:.4f}" if metric else "unknown"
        parts.append(f"best: {value} by {best['TrainingJobName']} ({values})")
    status, reason = found["HyperParameterTuningJobStatus"], found.get("FailureReason")
    return f"{status}: {', '.join(parts) or 'no job yet'}" + (f"; {reason}" if reason else "")
