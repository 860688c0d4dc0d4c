from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, tokens_of, world
from trainer.data import Data, Packing, PythonStdlibData, TextData
from trainer.data.documents import Documents, DocumentWriter
from trainer.data.language import in_validation
from trainer.data.packing import PackedSamples, WindowSamples, plan_packing

BOUNDARY = 256


def folder_of(tmp_path: Path, texts: dict[str, str]) -> Path:
    folder = tmp_path / "texts"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def documents_of(tmp_path: Path, sizes: list[int]) -> Documents:
    """Documents of that many tokens, boundary included; every other token is unique."""
    with DocumentWriter(tmp_path, boundary=0, vocabulary_size=1 << 20) as writer:
        for number, size in enumerate(sizes):
            writer.add(np.arange(size - 1) + 1000 * (number + 1))
    return Documents.open(tmp_path)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=120)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, length=st.integers(1, 17))
def test_windows_overlap_by_one_and_cover_every_token(
    sizes: list[int], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = documents_of(tmp_path_factory.mktemp("d"), sizes)
    samples = WindowSamples(documents, length, isolate=True)
    windows = [samples[index]["tokens"] for index in range(len(samples))]
    for before, after in itertools.pairwise(windows):
        assert len(before) == length + 1
        assert before[-1] == after[0]
    stream = [int(windows[0][0]), *(int(token) for window in windows for token in window[1:])]
    assert stream == documents.tokens.read(0, documents.num_tokens).tolist()
    assert documents.num_tokens == sum(sizes) + 1


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, length=st.integers(2, 17))
def test_windows_number_the_documents_they_span(
    sizes: list[int], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    samples = WindowSamples(documents_of(tmp_path_factory.mktemp("d"), sizes), length, isolate=True)
    for sample in (samples[index] for index in range(len(samples))):
        boundaries = sample["tokens"] == 0
        boundaries[0] = False
        numbers = np.cumsum(boundaries)
        if numbers[:-1].any():
            assert sample["documents"].tolist() == numbers.tolist()
            assert sample["documents"].dtype == np.int32
        else:
            assert "documents" not in sample


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, length=st.integers(1, 40))
def test_whole_packing_cuts_only_long_documents_and_trains_each_token_once(
    sizes: list[int], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("d")
    documents = documents_of(folder, sizes)
    plan_packing(documents, length, folder)
    samples = PackedSamples(documents, folder, isolate=True)
    stream = documents.tokens.read(0, documents.num_tokens)
    after = {int(token): int(follows) for token, follows in itertools.pairwise(stream) if token}
    inputs: list[int] = []
    for sample in (samples[index] for index in range(len(samples))):
        tokens = sample["tokens"]
        assert 1 < len(tokens) <= length + 1
        inputs += tokens[:-1].tolist()
        for token, follows in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
            if token:
                assert after[token] == follows
        owners = {int(token) // 1000 for token in tokens[:-1] if token}
        if len(owners) > 1:
            for owner in owners:
                mine = sample["documents"][tokens // 1000 == owner]
                assert len(set(mine.tolist())) == 1
            assert len(set(sample["documents"][:-1].tolist())) >= len(owners)
    assert sorted(inputs) == sorted(stream[:-1].tolist())


def test_whole_packing_wastes_little_and_keeps_documents_whole(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(5, 100, 500).tolist()
    documents = documents_of(tmp_path, sizes)
    plan_packing(documents, 128, tmp_path)
    samples = PackedSamples(documents, tmp_path, isolate=True)
    assert len(samples) * 128 < 1.1 * sum(sizes)
    first = np.load(tmp_path / "stretches.npy")
    assert len(first) == len(sizes)


def test_no_packing_gives_each_document_with_its_end_and_cuts_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": "abc", "b.txt": "defghijkl", "c.txt": "x"})
    data = build(TextData(paths=[str(folder)], packing=Packing.none, length=5, validation=0), tmp_path / "c")
    assert tokens_of(data.train) == [
        [BOUNDARY, *b"abc", BOUNDARY],
        [BOUNDARY, *b"defgh"],
        [BOUNDARY, *b"x", BOUNDARY],
    ]
    assert data.validation is None


def test_text_of_several_documents_without_isolation_has_no_document_numbers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": "abc", "b.txt": "def"})
    for isolate in (False, True):
        source = TextData(paths=[str(folder)], validation=0, isolate_documents=isolate)
        assert ("documents" in build(source, tmp_path / "c").train[0]) == isolate


def texts_of(data: Data) -> tuple[set[str], set[str]]:
    assert data.validation is not None
    sides = []
    for samples in (data.train, data.validation):
        stream = [token for sample in tokens_of(samples) for token in sample[1:]]
        texts = bytes(255 if token == BOUNDARY else token for token in stream).split(b"\xff")
        sides.append({text.decode() for text in texts if text})
    return sides[0], sides[1]


def test_split_goes_by_file_and_stays_when_files_are_added(tmp_path: Path) -> None:
    texts = {f"part{number % 3}/{number}.txt": f"<document {number}>" for number in range(60)}
    folder = folder_of(tmp_path, texts)
    train, validation = texts_of(build(TextData(paths=[str(folder)], validation=0.2), tmp_path / "c"))
    assert train | validation == set(texts.values())
    assert not train & validation
    assert 3 <= len(validation) <= 24
    assert validation == {text for name, text in texts.items() if in_validation(name, 0.2)}
    (folder / "new.txt").write_text("<new>")
    more_train, more_validation = texts_of(build(TextData(paths=[str(folder)], validation=0.2), tmp_path / "c"))
    assert train <= more_train
    assert validation <= more_validation


def test_split_of_a_single_file_holds_out_its_last_lines(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"book.txt": "".join(f"line {number}\n" for number in range(100))})
    train, validation = texts_of(build(TextData(paths=[str(folder / "book.txt")], validation=0.1), tmp_path / "c"))
    (head,), (tail,) = train, validation
    assert head.startswith("line 0\n")
    assert tail.endswith("line 99\n")
    assert tail.startswith("line ")
    assert 0.08 < len(tail) / len(head + tail) < 0.12


def test_split_of_few_files_holds_out_the_last(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "c.txt": "ccc"})
    train, validation = texts_of(build(TextData(paths=[str(folder)], validation=0.0001), tmp_path / "c"))
    assert (train, validation) == ({"aaa", "bbb"}, {"ccc"})


def test_split_by_validation_paths_uses_just_these(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "held/c.txt": "ccc"})
    source = TextData(paths=[str(folder / "a.txt"), str(folder / "b.txt")], validation_paths=[str(folder / "held")])
    assert texts_of(build(source, tmp_path / "c")) == ({"aaa", "bbb"}, {"ccc"})


def test_text_folder_reads_what_matches_and_is_not_excluded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.md": "aaa", "b.txt": "bbb", "draft/c.md": "ccc", "sub/d.md": "ddd"})
    source = TextData(paths=[str(folder)], pattern="*.md", exclude=["draft"], validation_paths=[str(folder / "b.txt")])
    assert texts_of(build(source, tmp_path / "c")) == ({"aaa", "ddd"}, {"bbb"})


def test_text_samples_stay_small_when_they_go_to_workers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": "abc\n" * 50_000})
    data = build(TextData(paths=[str(folder)]), tmp_path / "c")
    first = data.train[0]["tokens"].tolist()
    pickled = pickle.dumps(data.train)
    assert len(pickled) < 4_000
    assert pickle.loads(pickled)[0]["tokens"].tolist() == first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"paths": ["missing"]}, r"no file or folder 'missing'.*data\.paths"),
        ({"paths": ["."], "pattern": "*.rst"}, r"no file matches.*data\.pattern"),
        ({"paths": ["binary.txt"]}, r"binary.txt is not UTF-8 at byte 2"),
        ({"paths": ["empty.txt"]}, r"no text in empty.txt"),
        ({"paths": ["short.txt"], "length": 0}, r"length=0.*data\.length"),
        ({"paths": ["short.txt"], "validation": 1.0}, r"validation=1.0.*data\.validation"),
        ({"paths": ["short.txt"], "workers": -1}, r"workers=-1.*data\.workers"),
        ({"paths": ["short.txt"], "tokenizer": "no/such/folder"}, r"'no/such/folder' can't be loaded.*data\.tokenizer"),
    ],
)
def test_text_mistakes_are_one_line(
    settings: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("binary.txt").write_bytes(b"ab\xff\xfe")
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("short")
    with pytest.raises(ConfigError, match=words) as error:
        TextData(**settings).build(world(), tmp_path / "c", lambda _: None)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_stdlib_is_a_few_megabytes_split_by_file_without_packages_and_tests(tmp_path: Path) -> None:
    source = PythonStdlibData(validation=0.07)
    names = [file.name for file in source._files()]
    assert "argparse.py" in names
    assert not {"site-packages", "test", "tests", "__pycache__"} & {part for name in names for part in name.split("/")}
    said: list[str] = []
    data = build(source, tmp_path, said)
    assert data.validation is not None
    train, validation = (len(samples) * 256 for samples in (data.train, data.validation))
    assert 5e6 < train < 12e6
    assert 2e5 < validation < 1e6
    assert "standard library" in said[-1]
