from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, small_tokenizer, world, write_jsonl
from trainer.data import Packing, make_tokenizer
from trainer.data.messages import PLAIN_TEMPLATE, MessagesData, cut_at_answers

CHAT = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "a mat"},
    {"role": "assistant", "content": "the mat"},
]


def file_of(tmp_path: Path, *chats: list[dict[str, Any]]) -> str:
    return str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats]))


def counted_text(sample: dict[str, Any], tokenizer: str) -> str:
    return make_tokenizer(tokenizer).decode(sample["tokens"][sample["counts"]].tolist())


def test_messages_as_bytes_count_just_the_answers_and_their_ends(tmp_path: Path) -> None:
    source = MessagesData(files=[file_of(tmp_path, CHAT)], packing=Packing.none, validation=0)
    sample = build(source, tmp_path / "c").train[0]
    assert counted_text(sample, "bytes") == "sat on<|end|>\nthe mat<|end|>\n"
    text = make_tokenizer("bytes").decode(sample["tokens"].tolist())
    assert text.startswith("<|system|>\nbe short<|end|>\n<|user|>\nthe cat<|end|>\n<|assistant|>\nsat on<|end|>\n")
    assert sample["counts"].dtype == bool
    assert sample["counts"].shape == sample["tokens"].shape


def test_messages_through_a_tokenizers_own_template_count_just_the_answers(tmp_path: Path) -> None:
    folder = str(small_tokenizer(tmp_path / "t"))
    chat = CHAT[1:]
    source = MessagesData(files=[file_of(tmp_path, chat)], tokenizer=folder, packing=Packing.none, validation=0)
    sample = build(source, tmp_path / "c").train[0]
    inner = make_tokenizer(folder)
    expected = "<user> the cat </s> <assistant> sat on </s> <user> a mat </s> <assistant> the mat </s>"
    end = inner.boundary
    assert sample["tokens"].tolist() == [end, *inner.encode(expected), end]
    counted = sample["tokens"][sample["counts"]].tolist()
    assert counted == [*inner.encode("sat on"), end, *inner.encode("the mat"), end]


def test_messages_given_template_goes_first(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    files = [file_of(tmp_path, CHAT[1:3])]
    source = MessagesData(files=files, template=str(template), packing=Packing.none, validation=0)
    sample = build(source, tmp_path / "c").train[0]
    assert counted_text(sample, "bytes") == "[sat on]"
    template.write_text("{% for m in messages %}({{ m.content }}){% endfor %}")  # another template, another cache entry
    source = MessagesData(files=files, template=str(template), packing=Packing.none, validation=0)
    assert counted_text(build(source, tmp_path / "c").train[0], "bytes") == "(sat on)"


def test_messages_packed_whole_keep_their_counts_and_documents(tmp_path: Path) -> None:
    source = MessagesData(files=[file_of(tmp_path, CHAT[1:3], CHAT[3:])], length=400, validation=0)
    data = build(source, tmp_path / "c")
    assert len(data.train) == 1
    sample = data.train[0]
    assert counted_text(sample, "bytes") == "sat on<|end|>\nthe mat<|end|>\n"
    assert sample["documents"][:-1].max() == 1


def test_cut_at_answers_adds_up_to_the_whole_text() -> None:
    pieces = cut_at_answers([*CHAT, {"role": "user", "content": "thanks"}], PLAIN_TEMPLATE, {})
    assert "".join(text for text, _ in pieces).endswith("<|user|>\nthanks<|end|>\n")
    assert [text for text, answer in pieces if answer] == ["sat on<|end|>\n", "the mat<|end|>\n"]


def test_cut_at_answers_template_that_rewrites_the_past_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    with pytest.raises(ConfigError, match=r"changes what came before.*data\.template"):
        cut_at_answers(CHAT, template, {})


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"messages": CHAT[:2]}], {}, r"row 1 of train has no message of role 'assistant'"),
        ([{"chat": CHAT}], {}, r"field 'messages', only chat.*data\.messages_field"),
        ([{"messages": "hello"}], {}, r"row 1 of train has no list of messages"),
        ([{"messages": CHAT}], {"template": "missing.jinja"}, r"template='missing.jinja' is no readable file"),
        ([{"messages": CHAT}], {"template": "{{ messages | nonsense }}"}, r"row 1 of train.*nonsense.*data\.template"),
        ([{"messages": CHAT}], {"template": "{{ raise_exception('no system') }}"}, r"row 1 of train.*no system"),
    ],
)
def test_messages_mistakes_are_one_line(rows: list[Any], settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    with pytest.raises(ConfigError, match=words) as error:
        MessagesData(files=[str(file)], validation=0, **settings).build(world(), tmp_path / "c", lambda _: None)
    assert "\n" not in str(error.value)
