"""The regexes read what the display really prints."""

from __future__ import annotations

import io
import json
import math
import re

import pytest

from trainer.metrics.display import Display
from trainer.sagemaker.metric_definitions import LONGEST, MOST, metric_definitions


def read(lines: str) -> dict[str, list[str]]:
    """What the service would find: the first group of each match in each line."""
    found: dict[str, list[str]] = {}
    for line in lines.splitlines():
        for name, regex in metric_definitions().items():
            if match := re.search(regex, line):
                found.setdefault(name, []).append(match[1])
    return found


def shown(metrics: dict[str, float], evaluated: dict[str, float] | None = None, total: int | None = 1800) -> str:
    stream, clock = io.StringIO(), iter(range(100))
    display = Display(total, rank=0, stream=stream, now=lambda: float(next(clock)))
    display.step(100, metrics)
    if evaluated is not None:
        display.evaluated(600, evaluated)
    return stream.getvalue()


def test_metric_definitions_read_every_number_of_a_step_and_of_an_evaluation() -> None:
    metrics = {"loss": 1.23456, "grad_norm": 1e-5, "lr": 1e-05, "tokens_per_s": 1234567.0, "samples_per_s": 0.5,
               "step_s": 12.5, "mfu": 0.4321, "memory_mib": 81234.4, "tokens": 10.0}  # fmt: skip
    text = shown(metrics, {"val_loss": 2.5, "val_accuracy": 0.25, "ema_val_loss": 1e-7})
    assert " eta=" in text
    assert "lr=1e-05" in text
    assert read(text) == {
        "step": ["100", "600"],
        "loss": ["1.2346"],
        "grad_norm": ["1e-05"],
        "lr": ["1e-05"],
        "tokens_per_s": ["1234567"],
        "samples_per_s": ["0.5"],
        "step_s": ["12.5"],
        "mfu": ["0.4321"],
        "memory_mib": ["81234"],
        "val_loss": ["2.5000"],
        "val_accuracy": ["0.2500"],
        "ema_val_loss": ["1e-07"],
    }


def test_metric_definitions_leave_out_what_is_no_number() -> None:
    found = read(shown({"loss": math.nan, "grad_norm": math.inf, "lr": 2e6}, {"val_loss": -math.inf}, total=None))
    assert found == {"step": ["100", "600"], "lr": ["2e+06"]}


def test_metric_definitions_read_behind_what_mpirun_puts_in_front() -> None:
    line = "[1,mpirank:0,algo-1]<stdout>:" + shown({"loss": -0.5, "lr": 3.0}).splitlines()[0]
    assert read(line) == {"step": ["100"], "loss": ["-0.5000"], "lr": ["3"]}


@pytest.mark.parametrize(
    "line",
    [
        "the loss=1.5 of somebody's own print",
        "WARNING: after a resume loss=1.5 jumped",
        "val_loss=1.5",
        "step=100/1800 subloss=1.5",
        "step=100/1800 loss=1.5x",
        "lockstep=12 threads",
    ],
)
def test_metric_definitions_read_nothing_elsewhere(line: str) -> None:
    assert "loss" not in read(line)
    assert read(line).keys() <= {"step"}


def test_metric_definitions_keep_to_the_service_s_limits() -> None:
    found = metric_definitions()
    assert len(found) <= MOST
    assert all(1 <= len(regex) <= LONGEST for regex in found.values())
    assert all(re.compile(regex).groups == 1 for regex in found.values())


def test_metric_definitions_command_prints_them_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.cli import main

    with pytest.raises(SystemExit) as end:
        main(["metric-definitions"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["Name"]: each["Regex"] for each in found} == metric_definitions()
