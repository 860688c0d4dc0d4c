from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from tests.trainer.data.helpers import small_tokenizer
from trainer.data import make_tokenizer

TEXT = "def f(x):\n    return 'grün' + \"€\"  # \t<|boundary\n"


@given(st.text())
@settings(deadline=None)
def test_bytes_go_there_and_back(text: str) -> None:
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_many([text, "a"])[0].tolist() == tokenizer.encode(text)


def test_bytes_specials_lie_in_the_vocabulary_and_are_not_shown() -> None:
    tokenizer = make_tokenizer("bytes")
    specials = {tokenizer.boundary, tokenizer.padding, tokenizer.mask}
    assert specials == set(range(256, tokenizer.vocabulary_size))
    assert tokenizer.decode([104, *specials, 105, 0xC3]) == "hi�"  # type: ignore[list-item]


def test_bytes_saved_are_the_same_numbers_in_transformers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes")
    tokenizer.save(tmp_path)
    loaded = make_tokenizer(str(tmp_path))
    every_byte = "".join(map(chr, range(0x250))) + TEXT
    assert loaded.encode(every_byte) == tokenizer.encode(every_byte)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    for name in ("vocabulary_size", "boundary", "padding", "mask"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_hub_tokenizer_gives_no_specials_of_its_own_accord(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(str(small_tokenizer(tmp_path / "t")))
    assert tokenizer.boundary not in tokenizer.encode("the cat sat")
    assert tokenizer.decode([*tokenizer.encode("the cat"), tokenizer.boundary]) == "the cat"
    assert tokenizer.padding == tokenizer.boundary
    assert tokenizer.mask is None
    assert max(tokenizer.encode("the cat sat </s>")) < tokenizer.vocabulary_size


def test_hub_tokenizer_identity_follows_content_and_not_place(tmp_path: Path) -> None:
    first = small_tokenizer(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    other = small_tokenizer(tmp_path / "c", words="the dog sat")
    identities = [make_tokenizer(str(folder)).identity for folder in (first, tmp_path / "b", other)]
    assert identities[0] == identities[1] != identities[2]


def test_hub_tokenizer_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name in ("no/such-tokenizer", str(tmp_path / "empty"), str(tmp_path / "gone")):
        with pytest.raises(ConfigError, match=r"can't be loaded: .*data\.tokenizer") as error:
            make_tokenizer(name)
        assert "\n" not in str(error.value)


def test_hub_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = small_tokenizer(tmp_path / "t", end=None)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        make_tokenizer(str(folder))
