from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, tokens_of, world, write_jsonl
from trainer.data import Data, Packing
from trainer.data.dataset import DatasetData

TEXTS = [f"row number {number}" for number in range(40)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def texts_of(data: Data) -> list[str]:
    samples = [data.train] if data.validation is None else [data.train, data.validation]
    return [bytes(t for t in tokens if t < 256).decode() for part in samples for tokens in tokens_of(part)]


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def jsonl(tmp_path: Path, **columns: list[Any]) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", rows(**columns)))


def test_jsonl_rows_are_documents_split_by_their_text(tmp_path: Path) -> None:
    source = DatasetData(files=[jsonl(tmp_path, text=TEXTS)], packing=Packing.none, validation=0.2)
    data = build(source, tmp_path / "c")
    assert sorted(texts_of(data)) == sorted(TEXTS)
    assert data.validation is not None
    assert 2 <= len(data.validation) <= 16
    held_out = texts_of(data)[len(data.train) :]
    again = DatasetData(files=[jsonl(tmp_path, text=TEXTS[::-1])], packing=Packing.none, validation=0.2)
    assert set(texts_of(build(again, tmp_path / "c"))[len(data.train) :]) == set(held_out)


def test_parquet_files_by_pattern_read_another_field(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(pa.table({"body": TEXTS[number * 20 : number * 20 + 20]}), tmp_path / f"{number}.parquet")
    source = DatasetData(
        path="parquet", files=[str(tmp_path / "*.parquet")], text_field="body", packing=Packing.none, validation=0
    )
    assert texts_of(build(source, tmp_path / "c")) == TEXTS


def test_folder_laid_out_like_a_hub_data_set_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows(text=TEXTS[:30]))
    write_jsonl(folder / "test.jsonl", rows(text=TEXTS[30:]))
    source = DatasetData(path=str(folder), validation_split="test", packing=Packing.none)
    data = build(source, tmp_path / "c")
    assert len(data.train) == 30
    assert texts_of(data) == TEXTS


def test_stream_keeps_the_first_rows_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows(text=TEXTS))
    source = DatasetData(path=str(folder), stream=True, limit=7, packing=Packing.none, validation=0)
    data = build(source, tmp_path / "c")
    assert texts_of(data) == TEXTS[:7]
    assert "the first 7 rows of the stream, kept as tokens" in data.description


def test_validation_files_are_held_out(tmp_path: Path) -> None:
    train = jsonl(tmp_path, text=TEXTS[:30])
    held_out = write_jsonl(tmp_path / "held.jsonl", rows(text=TEXTS[30:]))
    data = build(DatasetData(files=[train], validation_files=[str(held_out)], packing=Packing.none), tmp_path / "c")
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (30, 10)
    assert texts_of(data) == TEXTS


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([2, 0, 2, 0], ["0", "1", "2"], [2, 0, 2, 0]),
        (["spam", "ham", "spam", "ham"], ["ham", "spam"], [1, 0, 1, 0]),
    ],
)
def test_label_field_gives_classes(labels: list[Any], classes: list[str], numbers: list[int], tmp_path: Path) -> None:
    source = DatasetData(
        files=[jsonl(tmp_path, text=TEXTS[:4], kind=labels)],
        label_field="kind",
        packing=Packing.none,
        length=6,
        validation=0,
    )
    data = build(source, tmp_path / "c")
    assert data.classes == classes
    assert [data.train[index]["label"] for index in range(4)] == numbers
    assert data.train[0]["tokens"].tolist() == [256, *b"row n"]


def test_source_field_gives_what_the_encoder_reads_and_its_end(tmp_path: Path) -> None:
    source = DatasetData(
        files=[jsonl(tmp_path, answer=["ja", "nein"], question=["yes", "a long question"])],
        text_field="answer",
        source_field="question",
        source_length=6,
        packing=Packing.none,
        validation=0,
    )
    data = build(source, tmp_path / "c")
    assert data.train[0]["tokens"].tolist() == [256, *b"ja", 256]
    assert data.train[0]["source_tokens"].tolist() == [*b"yes", 256]
    assert data.train[1]["source_tokens"].tolist() == [*b"a long"]


def test_empty_rows_are_left_out(tmp_path: Path) -> None:
    source = DatasetData(files=[jsonl(tmp_path, text=["a", "", None, "b"])], packing=Packing.none, validation=0)
    assert texts_of(build(source, tmp_path / "c")) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"files": ["gone.jsonl"]}, r"no file 'gone.jsonl'.*data\.files"),
        ({"files": ["gone.jsonl"], "limit": 0}, r"limit=0.*data\.limit"),
        ({}, r"path=json needs files.*data\.files"),
        ({"path": "no/such-set"}, r"'no/such-set' can't be read.*data\.path"),
        ({"path": "some/set", "stream": True}, r"stream=true has no end.*data\.limit"),
        ({"files": ["good.jsonl"], "text_field": "body"}, r"row 1 of train has no field 'body', only text, n"),
        ({"files": ["good.jsonl"], "text_field": "n"}, r"row 1 of train has int in field 'n', not text"),
        ({"files": ["good.jsonl"], "label_field": "n"}, r"packing=windows mixes rows.*data\.packing"),
        ({"files": ["good.jsonl"], "packing": Packing.none, "label_field": "m"}, r"None in field 'm'.*label_field"),
        ({"files": ["good.jsonl"], "validation": 1e-9}, r"2 documents into 2 and 0.*data\.validation"),
        ({"files": ["broken.jsonl"]}, r"broken.jsonl' can't be read.*data\.files"),
        ({"path": "parquet", "files": ["good.jsonl"]}, r"good.jsonl' can't be read.*data\.files"),
        ({"files": ["good.jsonl"], "validation_files": ["a"], "validation_split": "b"}, r"data\.validation_split"),
    ],
)
def test_dataset_mistakes_are_one_line(
    settings: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("good.jsonl"), rows(text=["a", "b"], n=[1, 2]))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ConfigError, match=words) as error:
        DatasetData(**settings).build(world(), tmp_path / "c", lambda _: None)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
