"""Any configuration runs, or is refused in one line that names a key: drawn from the schemas, through the real path.

`SHARDWRIGHT_FUZZ=500 python -m pytest tests/test_fuzz.py --hypothesis-seed 1` draws 500; without, a few, always the
same. Keys and types are read off the schemas, so that a new key is drawn by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sysconfig
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from strategies.testing import Workers
from tests.starts import Start, start
from trainer.config import CONF, compose

NUM_EXAMPLES = int(os.environ.get("SHARDWRIGHT_FUZZ", "0"))
MOST_S = 20.0

SIZES = ("hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2")
TINY = {name: [f"model.config.{size}" for size in SIZES] for name in ("llama_tiny", "bert_tiny", "hf")}
NEEDED = {
    **{f"model={name}": words for name, words in TINY.items()},
    "model=llama_tiny": [*TINY["llama_tiny"], "model.config.num_key_value_heads=2"],
    "model=hf": ["model.architecture=llama", *TINY["hf"], "model.config.num_key_value_heads=2"],
    "model=t5_small": [f"model.config.{size}" for size in (
        "d_model=16", "d_kv=8", "d_ff=16", "num_layers=1", "num_heads=2", "vocab_size=300")],
    "data=text": ["data.paths=[{files}/text.txt]"],
    "data=tokens": ["data.paths=[{files}/tokens.npy]", "data.boundary=0"],
    "data=jsonl": ["data.files=[{files}/rows.jsonl]"],
    "data=parquet": ["data.files=[{files}/rows.parquet]"],
    "data=messages": ["data.files=[{files}/chats.jsonl]"],
    "data=mixture": ["data.sources.code.length=16"],
    "hooks=[samples]": ["hooks.samples.length=2", "hooks.samples.window=16"],
    "hooks=[chat_samples]": ["hooks.chat_samples.length=2", "hooks.chat_samples.window=16"],
    "schedule=inverse_sqrt": ["schedule.warmup=1"],
}  # fmt: skip
"""What a choice wants to be told, and to be small."""
BASE = ("trainer.max_steps=2", "trainer.global_batch=4", "trainer.micro_batch=2", "trainer.log_every=1",
        "checkpoint.every=null", "hooks.quitter.step=1", "hooks.quitter.rank=0")  # fmt: skip
LENGTHY = {"hooks.samples.length", "hooks.chat_samples.length"}
"""A large value is meant, and takes its time."""
ELSEWHERE = {"run.dir", "run.name", "cache", "checkpoint.folder"}
"""Paths are drawn from those below a folder of the test's own, or broken."""
ELSEWHERE_VALUES = ("{own}/a", "{own}/é ü", "''", "/proc/nothing", "{files}/text.txt", "..", "null", "[1]",
                    "'{own}/b c'", "{own}/" + "y" * 300)  # fmt: skip
ABSENT = {"backend=nccl", "precision=tf32", "logger=wandb", "logger=mlflow", "data=hub"}
"""Refused here whatever else is said."""


def options(group: str) -> list[str]:
    """The choices of a group that a test can afford."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    affordable = [name for name in names if group != "model" or f"model={name}" in NEEDED]
    return [name for name in affordable if f"{group}={name}" not in ABSENT]


GROUPS = ("strategy", "backend", "model", "data", "optimizer", "schedule", "precision", "logger", "hooks")
DEFAULTS = {"strategy": "ddp", "backend": "auto", "model": "llama_tiny", "data": "text", "optimizer": "adamw",
            "schedule": "cosine", "precision": "fp32", "logger": "[]", "hooks": "[quitter]"}  # fmt: skip


def words_of(choices: dict[str, str]) -> list[str]:
    """A command line that chooses these, and says what they need."""
    found = [f"{group}={option}" for group, option in choices.items()]
    needed = [word for choice in found for word in NEEDED.get(choice.replace(",quitter", ""), [])]
    length = [] if choices["data"] == "mixture" else ["data.length=16"]
    return [*found, *needed, *length, *BASE]


def typed_keys(node: DictConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a composed configuration, and its type as the schema says it."""
    cls = OmegaConf.get_type(node)
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    for name in map(str, node):
        key, value = f"{path}{name}", node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none():
            yield key, dict
            yield from typed_keys(value, f"{key}.")
        else:
            yield key, hints.get(name, Any)


@functools.cache
def keys_of(choices: tuple[tuple[str, str], ...]) -> list[tuple[str, Any]]:
    import tests.trainer.jobs  # noqa: F401 - registers the hook `quitter`

    return sorted(
        typed_keys(compose([word.replace("{files}", "x") for word in words_of(dict(choices))])),
        key=lambda entry: entry[0],
    )


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
INTS = st.sampled_from([1, 2, 4, 8, 16, 0, -1, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63)])
FLOATS = st.sampled_from([0.1, 0.5, 0.9, 1e-3, 1.0, 2.0, 0.0, -0.0, -0.5, 1e-300, 1e300, "nan", "inf", "-inf"])
WRONG = st.one_of(
    st.sampled_from(["null", "true", "[]", "{}", "{a: 1}", "[null]", "[[1]]", "''", "???", "${seed}", "${nothing}",
                     "${oc.env:HOME}", "1e999", "0x10", "1_000", "x y", "'\"'", "\\", "[", "a,b", "é", "..", "-"]),
    TEXTS,
    st.just("x" * 5000),
)  # fmt: skip


def literal(value: Any) -> str:
    """As one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def values_of(key: str, kind: Any) -> st.SearchStrategy[str]:
    """What one might give for a key: fitting its type, at its edges, and not at all."""
    if key in LENGTHY:
        return st.one_of(st.integers(-2, 3).map(str), WRONG)
    if key in ELSEWHERE:
        return st.sampled_from(ELSEWHERE_VALUES)
    fitting: list[st.SearchStrategy[str]] = []
    for member in typing.get_args(kind) or (kind,):
        if member is int:
            fitting += [INTS.map(str)]
        elif member is float:
            fitting += [FLOATS.map(str), INTS.map(str)]
        elif member is bool:
            fitting += [st.sampled_from(["true", "false"])]
        elif member is str:
            fitting += [TEXTS.map(literal)]
        elif member is type(None):
            fitting += [st.just("null")]
        elif isinstance(member, type) and issubclass(member, Enum):
            fitting += [st.sampled_from([each.name for each in member])]
        elif typing.get_origin(kind) is list:
            fitting += [st.lists(st.one_of(TEXTS, st.integers(-2, 9)), max_size=3).map(literal)]
        else:
            fitting += [INTS.map(str), FLOATS.map(str), TEXTS.map(literal)]
    return st.integers(0, 4).flatmap(lambda die: st.one_of(*fitting) if die else WRONG)


@st.composite
def starts(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """A command line, and the keys and groups that it has changed."""
    choices = dict(DEFAULTS)
    changed = []
    for group in draw(st.lists(st.sampled_from(GROUPS), max_size=2, unique=True)):
        option = draw(st.sampled_from(options(group)))
        choices[group] = f"[{option}]" if group == "logger" else f"[{option},quitter]" if group == "hooks" else option
        changed.append(group)
    words = words_of(choices)
    keys = keys_of(tuple(choices.items()))
    for key, kind in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique_by=lambda entry: entry[0])):
        sign = draw(st.sampled_from(["", "", "", "", "", "", "", "+", "++", "~"]))
        word = f"{sign}{key}" if sign == "~" else f"{sign}{key}={draw(values_of(key, kind))}"
        if draw(st.integers(0, 24)) == 0:
            word = word.replace(key, f"{key}x", 1)
        words.append(word)
        changed.append(key)
    return words, changed


def fuzzed(words: list[str], library: str) -> Start:
    """One start, whose standard library is the files in `library`."""
    path = mock.Mock(side_effect=lambda name: library if name == "stdlib" else sysconfig.get_path(name))
    with mock.patch("trainer.data.text.sysconfig", mock.Mock(wraps=sysconfig, get_path=path)):
        return start(words)


def problem(found: Start, changed: list[str]) -> str | None:
    """What is wrong with how a start ended; None: nothing."""
    if found.seconds > MOST_S:
        return f"it took {found.seconds:.0f} s"
    if "Traceback" in found.out + found.err:
        return "a traceback"
    if found.code in (0, 75):
        return None if not found.err else "it ran, and complained"
    if found.err.count("\n") != 1:
        return "not one line"
    if found.code == 1 and "isn't finite" in found.err:
        return None
    if found.code != 2 or not found.err.startswith("ConfigError: "):
        return f"exit code {found.code}"
    parts = {part for key in changed for part in (key, key.split(".")[0], key.split(".")[-1])}
    return None if any(part in found.err for part in parts) else f"none of {sorted(parts)} is named"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    text = Path(__file__).read_text()
    (folder / "text.txt").write_text(text)
    rows = [{"text": line * 4} for line in text.splitlines() if line]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": row["text"]}]} for row in rows
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), folder / "rows.parquet")
    np.save(folder / "tokens.npy", (np.arange(3000) % 250).astype(np.uint16))
    library = folder / "library"
    library.mkdir()
    for number in range(40):
        (library / f"module{number}.py").write_text(text[40 * number : 40 * number + 400])
    return folder


@settings(
    max_examples=NUM_EXAMPLES or 40,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    database=None,
    print_blob=False,
    phases=[Phase.generate, Phase.shrink] if NUM_EXAMPLES else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=starts())
def test_start_of_any_configuration_runs_or_is_refused_in_one_line(
    workers: Workers, files: Path, tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[str], list[str]]
) -> None:
    words, changed = drawn
    own = tmp_path_factory.mktemp("own")
    places = [f"run.dir='{own}/run'", f"cache='{files}/cache'"]
    given_words = [word.replace("{files}", str(files)).replace("{own}", str(own)) for word in words]
    quiet = {"TORCH_COMPILE_DISABLE": "1"}  # a compiler takes longer than a run
    [found] = workers.run(
        fuzzed, 1, [*places, *given_words], str(files / "library"), environment=quiet, timeout=3 * MOST_S
    )
    shutil.rmtree(own)
    event(f"exit code {found.code}")
    wrong = problem(found, changed)
    assert wrong is None, f"{wrong}: {words[-2:]} of {words}\n{found.err[-3000:]}"
