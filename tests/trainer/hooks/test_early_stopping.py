"""EarlyStopping: when it stops, and that it counts on after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies.errors import ConfigError
from strategies.world import World
from trainer.hooks.base import Moment
from trainer.hooks.early_stopping import EarlyStopping, Mode
from trainer.progress import Progress


def moment(step: int, **metrics: float) -> Moment:
    return Moment(
        progress=Progress(step=step),
        metrics=metrics,
        world=World(device=torch.device("cpu"), store=dist.HashStore()),
        folder=Path(),
        predict=lambda batch: None,
        tokenizer=None,
        say=print,
        log_text=lambda name, text: None,
    )


def answers(hook: EarlyStopping, values: Iterable[float]) -> list[str | None]:
    return [hook.on_evaluate(moment(step, val_loss=value)) for step, value in enumerate(values, start=1)]


def test_early_stopping_without_new_best_stops_after_its_patience() -> None:
    *before, last = answers(EarlyStopping(patience=2), [3.0, 2.0, 2.5, 1.5, 1.6, 1.5])
    assert before == [None] * 5
    assert last == "val_loss did not improve in 2 evaluations (best 1.5000 at step 4)"


def test_early_stopping_small_gain_is_no_gain() -> None:
    assert answers(EarlyStopping(patience=2, min_delta=0.1), [2.0, 1.95, 1.91])[-1] is not None
    assert answers(EarlyStopping(patience=2, min_delta=0.1), [2.0, 1.95, 1.89])[-1] is None


def test_early_stopping_max_looks_the_other_way() -> None:
    assert answers(EarlyStopping(patience=1, mode=Mode.max), [0.5, 0.6]) == [None, None]
    assert answers(EarlyStopping(patience=1, mode=Mode.max), [0.5, 0.4])[-1] is not None


def test_early_stopping_not_a_number_is_no_best() -> None:
    assert answers(EarlyStopping(patience=2), [math.nan, math.nan]) == [
        None,
        "val_loss did not improve in 2 evaluations (never a number)",
    ]
    assert answers(EarlyStopping(patience=2), [math.nan, 1.0, math.inf]) == [None, None, None]


def test_early_stopping_counts_on_after_a_restart() -> None:
    values = [3.0, 2.0, 2.5, 2.6, 2.7]
    whole = answers(EarlyStopping(patience=3), values)
    first = EarlyStopping(patience=3)
    answers(first, values[:3])
    second = EarlyStopping(patience=3)
    second.load_state(json.loads(json.dumps(first.state())))
    assert answers(second, values[3:]) == whole[3:]
    assert whole[-1] is not None


def test_early_stopping_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'bleu'; there are loss, val_loss\. .*hooks\.early_stopping\.metric"):
        EarlyStopping(metric="bleu").on_evaluate(moment(1, val_loss=1.0, loss=2.0))


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}])
def test_early_stopping_bad_setting_is_refused(options: dict[str, float]) -> None:
    [key] = options
    with pytest.raises(ConfigError, match=rf"hooks\.early_stopping\.{key}"):
        EarlyStopping(**options)  # type: ignore[arg-type]
