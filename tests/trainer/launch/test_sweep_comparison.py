"""What is shown of a sweep, while it goes and afterwards."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console

from trainer.launch.board import Board, table
from trainer.launch.book import Entry, Objective, Standing
from trainer.launch.comparison import draw, write_csv, write_picture


def entry(number: int, lr: str, model: str, loss: float | None, standing: Standing = Standing.finished) -> Entry:
    metrics = {} if loss is None else {"step": 20, "loss": loss + 1, "val_loss": loss, "grad_norm": 3.0}
    curves = {} if loss is None else {"val_loss": {10: 2 * loss, 20: loss}}
    detail = "it burns" if standing is Standing.failed else ""
    return Entry(name=f"{number:03d}", words=(f"optimizer.lr={lr}", f"model={model}"), standing=standing,
                 metrics=metrics, curves=curves, detail=detail, seconds=65.0)  # fmt: skip


JOBS = [
    entry(0, "1e-3", "[small]", 2.0),
    entry(1, "1e-2", "[small]", None, Standing.failed),
    entry(2, "1e-1", "large", 1.0),
    entry(3, "3e-1", "large", 1.5, Standing.pruned),
]


def test_csv_has_a_row_for_each_job_with_the_best_first(tmp_path: Path) -> None:
    write_csv(tmp_path / "comparison.csv", JOBS, Objective())
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["002", "000", "003", "001"]
    assert list(rows[0]) == ["job", "state", "optimizer.lr", "model", "step", "val_loss", "loss", "seconds", "folder",
                             "why"]  # fmt: skip
    assert list(rows[0].values()) == ["002", "finished", "1e-1", "large", "20", "1.0", "2.0", "65.0",
                                      str(tmp_path / "002"), ""]  # fmt: skip
    assert (rows[3]["val_loss"], rows[3]["why"]) == ("", "it burns")


def test_picture_has_a_curve_for_each_job_and_a_panel_for_what_varies(tmp_path: Path) -> None:
    figure = draw(JOBS, Objective())
    assert figure is not None
    curves, rates, models = figure.axes
    assert [len(line.get_xdata()) for line in curves.lines] == [2, 2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "lr=0.1 model=large", "lr=0.001 model=[small]", "lr=0.3 model=large (pruned)",
    ]  # fmt: skip
    assert rates.get_xscale() == "log"
    assert sorted(float(line.get_xdata()[0]) for line in rates.lines) == [0.001, 0.1, 0.3]
    assert [label.get_text() for label in models.get_xticklabels()] == ["[small]", "large"]
    assert write_picture(tmp_path / "it.png", JOBS, Objective())
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert not write_picture(tmp_path / "none.png", JOBS[1:2], Objective())


def test_table_shows_values_as_they_are_and_states() -> None:
    text = io.StringIO()
    Console(file=text, width=120).print(table(JOBS, "val_loss"))
    lines = text.getvalue().splitlines()
    assert len(lines) == 4 + len(JOBS)
    assert "[small]" in lines[3]
    assert all(word in lines[6] for word in ("003", "0.3", "pruned", "20", "1.5000", "2.5000", "0:01:05"))


def test_board_without_a_terminal_tells_each_change_once() -> None:
    text = io.StringIO()
    done, job = JOBS[0], entry(4, "1e-3", "large", None, Standing.waiting)
    with Board(Objective(), lambda: 2, Console(file=text, width=200), [done]) as board:
        board.show([done, job])
        job.standing = Standing.running
        board.show([done, job])
        board.show([done, job])
        job.pruning = True
        board.show([done, job])
        job.standing, job.metrics, job.seconds = Standing.pruned, {"step": 3, "val_loss": 7.0}, 5.0
        board.show([done, job])
    assert text.getvalue().splitlines() == [
        "004 (optimizer.lr=1e-3 model=large): running",
        "004 (optimizer.lr=1e-3 model=large): is asked to stop, since others do better",
        "004 (optimizer.lr=1e-3 model=large): pruned, step 3, val_loss 7.0000, time 0:00:05",
    ]


def test_board_on_a_terminal_shows_as_many_jobs_as_there_is_room_for() -> None:
    text = io.StringIO()
    jobs = [entry(number, "1e-3", "large", 3.0, Standing.finished) for number in range(50)]
    jobs[40].standing = Standing.running
    console = Console(file=text, width=120, height=20, force_terminal=True, color_system=None)
    with Board(Objective(), lambda: 60, console) as board:
        board.show(jobs)
        shown = text.getvalue()
    assert "│040" in shown
    assert shown.count("│0") == 12
    assert "1 running, 49 finished of 60; 38 not shown" in shown
