from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, tokens_of, world
from trainer.data import Packing, TokenType
from trainer.data.tokens import TokenData

STREAM = [token for number in range(20) for token in (0, *range(10 * number + 1, 10 * number + 6))]  # 20 x 6 tokens


def files(tmp_path: Path) -> list[str]:
    np.save(tmp_path / "a.npy", np.array(STREAM[:50], dtype=np.int32))
    np.array(STREAM[50:], dtype=np.uint32).tofile(tmp_path / "b.bin")
    return [str(tmp_path / "a.npy"), str(tmp_path / "b.bin")]


def stream_of(samples: list[list[int]]) -> list[int]:
    return [samples[0][0], *(token for sample in samples for token in sample[1:])]


def test_tokens_of_several_files_are_one_stream(tmp_path: Path) -> None:
    source = TokenData(paths=files(tmp_path), type=TokenType.uint32, boundary=0, length=7, validation=0)
    data = build(source, tmp_path / "c")
    assert stream_of(tokens_of(data.train)) == STREAM
    assert data.train[0]["tokens"].dtype == np.int64
    assert data.train[0]["documents"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert data.tokenizer is None


@pytest.mark.parametrize("packing", list(Packing))
def test_tokens_end_is_held_out_at_a_document(packing: Packing, tmp_path: Path) -> None:
    paths = files(tmp_path)
    source = TokenData(paths=paths, type=TokenType.uint32, boundary=0, length=6, packing=packing, validation=0.22)
    data = build(source, tmp_path / "c")
    assert data.validation is not None
    train, validation = tokens_of(data.train), tokens_of(data.validation)
    assert stream_of(train) == [*STREAM[: 16 * 6], 0]
    assert stream_of(validation) == STREAM[16 * 6 :]


def test_tokens_without_boundary_are_cut_by_number(tmp_path: Path) -> None:
    source = TokenData(paths=files(tmp_path), type=TokenType.uint32, isolate_documents=False, length=10, validation=0.1)
    data = build(source, tmp_path / "c")
    assert data.validation is not None
    assert stream_of(tokens_of(data.train)) + stream_of(tokens_of(data.validation)) == STREAM
    assert len(stream_of(tokens_of(data.validation))) == 12


def test_tokens_validation_paths_are_held_out(tmp_path: Path) -> None:
    first, second = files(tmp_path)
    source = TokenData(paths=[first], validation_paths=[second], type=TokenType.uint32, boundary=0)
    data = build(source, tmp_path / "c")
    assert data.validation is not None
    assert stream_of(tokens_of(data.train)) == STREAM[:50]
    assert stream_of(tokens_of(data.validation)) == STREAM[50:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"paths": []}, r"no files are given.*data\.paths"),
        ({"paths": ["gone.npy"], "boundary": 0}, r"gone.npy can't be read.*data\.paths"),
        ({"paths": ["odd.bin"], "boundary": 0}, r"odd.bin can't be read.*data\.type"),
        ({"paths": ["floats.npy"], "boundary": 0}, r"float64 of shape \(3,\), not a row of whole numbers"),
        ({"paths": ["pickle.npy"], "boundary": 0}, r"pickle.npy can't be read"),
        ({"paths": ["good.npy"]}, r"token between documents isn't known.*data\.boundary"),
        ({"paths": ["good.npy"], "tokenizer": "bytes"}, r"numbers from 0 to 300.*0 to 258.*data\.tokenizer"),
        ({"paths": ["good.npy"], "boundary": 7, "packing": Packing.none}, r"of 1 documents is none.*data\.validation"),
    ],
)
def test_tokens_mistakes_are_one_line(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", np.array([0, 300, 5]))
    np.save("floats.npy", np.zeros(3))
    np.save("pickle.npy", np.array([{"a": 1}], dtype=object))
    Path("odd.bin").write_bytes(b"abc")
    if settings["paths"] == []:
        settings = {**settings, "boundary": 0}
    with pytest.raises(ConfigError, match=words) as error:
        TokenData(**settings).build(world(), tmp_path / "c", lambda _: None)
    assert "\n" not in str(error.value)
