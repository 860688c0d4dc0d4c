"""Pictures: they appear, with the right things in them, and never end a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from trainer.metrics.jsonl import Line, MetricsFile, read
from trainer.metrics.plots import draw_loss, draw_step_time, smoothed, thinned, write_plots


def record(folder: Path, steps: int = 60) -> list[Line]:
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, steps + 1):
            loss = math.nan if step == 7 else 1 + 4 * math.exp(-step / 10)
            times = {"data_s": 0.01, "compute_s": 0.08, "communication_s": 0.01, "checkpoint_s": 0.0}
            file.write(step, {"loss": loss, "lr": 1e-3, "step_s": 0.1, **times})
            if step % 20 == 0:
                file.write(step, {"val_loss": loss + 0.1})
    return read(folder / "metrics.jsonl")


def test_plots_of_a_run_are_pictures_of_the_expected_size(tmp_path: Path) -> None:
    from matplotlib.image import imread

    record(tmp_path)
    said: list[str] = []
    files = write_plots(tmp_path, [20, 40], said.append)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["plots/loss.png", "plots/step_time.png"]
    assert said == []
    assert imread(files[0]).shape[:2] == (696, 1200)
    assert imread(files[1]).shape[:2] == (552, 1200)
    assert all(np.asarray(imread(file)).std() > 0.05 for file in files)  # not blank
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["loss.png", "step_time.png"]


def test_draw_loss_shows_both_losses_and_the_resumes(tmp_path: Path) -> None:
    figure = draw_loss(record(tmp_path), [20, 40])
    assert figure is not None
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert len(lines["train"].get_xdata()) == 59  # without the step that wasn't finite
    assert list(lines["validation"].get_xdata()) == [20, 40, 60]
    marks = [line.get_xdata()[0] for line in axes.get_lines() if len(set(line.get_xdata())) == 1]
    assert marks == [20, 40]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train", "train, smoothed", "validation", "resumed"]


def test_draw_step_time_says_the_parts(tmp_path: Path) -> None:
    figure = draw_step_time(record(tmp_path))
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["compute  80.0%", "communication  10.0%", "data  10.0%"]


def test_draw_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    assert draw_loss([]) is None
    assert draw_step_time([]) is None
    assert draw_loss([{"step": 1, "loss": math.nan}]) is None
    assert write_plots(tmp_path, [], print) == []


@pytest.mark.parametrize(
    "lines", [[{"step": 1, "loss": 2.0, "step_s": 0.1}], [{"step": 5, "val_loss": 2.0, "step_s": 0.0}]]
)
def test_draw_single_line_works(lines: list[Line]) -> None:
    assert draw_loss(lines, [1]) is not None
    assert draw_step_time(lines, [1]) is not None


def test_write_plots_failure_is_a_message(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "plots").write_text("a file where a folder should be")
    said: list[str] = []
    assert write_plots(tmp_path, [], said.append) == []
    assert said[0].startswith("the plots could not be drawn: FileExistsError")


def test_smoothed_keeps_straight_lines_and_calms_noise() -> None:
    line = [float(x) for x in range(300)]
    assert smoothed(line) == pytest.approx(line)
    noise = [float(x % 2) for x in range(300)]
    assert np.std(smoothed(noise)[10:-10]) < 0.1
    assert smoothed([]) == []


def test_thinned_keeps_the_mean_and_the_last_step() -> None:
    xs, ys = [float(x) for x in range(1, 10001)], [float(x % 7) for x in range(10000)]
    few_x, few_y = thinned((xs, ys))
    assert len(few_x) == len(few_y) == 2000
    assert few_x[-1] == 10000
    assert math.fsum(few_y) / 2000 == pytest.approx(math.fsum(ys) / 10000)
