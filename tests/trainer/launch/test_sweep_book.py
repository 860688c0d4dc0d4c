"""What is written down of a sweep, who may write it, and in which order its jobs stand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from strategies.errors import ConfigError
from trainer.launch.book import Book, Entry, Objective, Standing, thinned
from trainer.launch.search import job_name

ABOUT = {"script": "train.py", "settings": ["seed=1"]}


def entry(name: str, standing: Standing = Standing.finished, **metrics: float) -> Entry:
    return Entry(name=name, words=(f"name={name}",), standing=standing, metrics=metrics)


def test_book_reads_what_it_has_written(tmp_path: Path) -> None:
    book = Book(tmp_path / "sweep", ABOUT)
    one = Entry(
        name="000-a", words=("lr=1", "text='a=b'"), standing=Standing.pruned, detail="why", handle="12 of 3", begun=5.0,
        before_s=1.0, seconds=2.0, pruning=True, metrics={"step": 3, "loss": math.nan, "val_loss": -math.inf},
        curves={"loss": {1: 2.0, 3: math.nan}},
    )  # fmt: skip
    book.entries.append(one)
    book.save()
    book.close()
    text = (tmp_path / "sweep" / "sweep.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    book = Book(tmp_path / "sweep", ABOUT)
    book.close()
    [found] = book.entries
    assert repr(found) == repr(one)
    assert found.values == {"lr": "1", "text": "'a=b'"}


def test_book_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    book = Book(tmp_path, ABOUT)
    with pytest.raises(ConfigError, match=r"another process runs the sweep in .*--sweep-dir"):
        Book(tmp_path, ABOUT)
    book.close()
    Book(tmp_path, ABOUT).close()


def test_book_of_another_sweep_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    book = Book(tmp_path, ABOUT)
    book.save()
    book.close()
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ConfigError, match=r"another settings: 'seed=1', not 'seed=2'\. Choose another folder"):
        Book(tmp_path, ABOUT | {"settings": ["seed=2"]})
    assert (tmp_path / "sweep.json").read_bytes() == before
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep\.json can't be read"):
        Book(tmp_path, ABOUT)


def test_book_in_which_nothing_was_written_leaves_no_folder(tmp_path: Path) -> None:
    Book(tmp_path / "sweep", ABOUT).close()
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "mine").write_text("")
    Book(tmp_path, ABOUT).close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_objective_is_val_loss_where_a_job_has_one() -> None:
    plain, better = entry("a", loss=1.0), entry("b", loss=2.0, val_loss=3.0)
    assert Objective().named([plain]) == "loss"
    assert Objective().named([plain, better]) == "val_loss"
    assert Objective(name="val_accuracy").named([plain, better]) == "val_accuracy"


def test_ranked_puts_the_best_finished_job_first_and_what_is_no_number_last() -> None:
    jobs = [
        entry("failed", Standing.failed, loss=0.1), entry("pruned", Standing.pruned, loss=0.2), entry("bad", loss=3.0),
        entry("nan", loss=math.nan), entry("good", loss=1.0), entry("waiting", Standing.waiting),
    ]  # fmt: skip
    assert [job.name for job in Objective().ranked(jobs)] == ["good", "bad", "nan", "pruned", "failed", "waiting"]
    assert [job.name for job in Objective(maximize=True).ranked(jobs)][:3] == ["bad", "good", "nan"]


def test_thinned_curves_keep_one_grid_and_their_last_point() -> None:
    short, long = ({step: float(step) for step in range(10, 10 * number + 1, 10)} for number in (600, 1100))
    assert thinned({1: 2.0}) == {1: 2.0}
    assert len(thinned(long)) <= 257
    assert list(thinned(long))[-1] == 11000
    assert {step for step in thinned(long) if step <= 6000} <= set(thinned(short))


def test_job_name_is_short_and_only_of_letters_that_every_launcher_takes() -> None:
    assert job_name(3, ["optimizer.lr=0.0012345678", "+data.path='a b/c'"]) == "003-lr-0-001235-path-a-b-c"
    assert job_name(12, ["x=" + "y" * 90]) == "012-x-" + "y" * 38
    assert job_name(0, []) == "000"
