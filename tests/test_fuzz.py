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
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from strategies.testing import Workers
from tests.starts import Start, start
from trainer.complaints import CONF
from trainer.config import compose

NUM_EXAMPLES = int(os.environ.get("SHARDWRIGHT_FUZZ", "0"))
MOST_S = 20.0

SIZES = ("hidden_size=16", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2")
TINY = {name: [f"model.config.{size}" for size in SIZES] for name in ("llama_tiny", "bert_tiny", "vit_tiny", "hf")}
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
    "data=images": ["data.path={files}/photos", "data.size=8", "data.channels=1", "data.validation=0.2"],
    "hooks=[samples]": ["hooks.samples.length=2", "hooks.samples.window=16"],
    "hooks=[chat_samples]": ["hooks.chat_samples.length=2", "hooks.chat_samples.window=16"],
    "schedule=inverse_sqrt": ["schedule.warmup=1"],
    "logger=[prometheus]": ["logger.prometheus.port=0"],
}  # fmt: skip
"""What a choice wants to be told, and to be small."""
BASE = ("trainer.max_steps=2", "trainer.global_batch=4", "trainer.micro_batch=2", "trainer.log_every=1",
        "checkpoint.every=null", "hooks.quitter.step=1", "hooks.quitter.rank=0")  # fmt: skip
LENGTHY = {"hooks.samples.length", "hooks.chat_samples.length"}
"""A large value is meant, and takes its time."""
ELSEWHERE = {"run.dir", "run.name", "cache", "checkpoint.folder", "logger.prometheus.targets"}
"""Paths are drawn from those below a folder of the test's own, or broken."""
ELSEWHERE_VALUES = ("{own}/a", "{own}/é ü", "''", "/proc/nothing", "{files}/text.txt", "..", "null", "[1]",
                    "'{own}/b c'", "{own}/" + "y" * 300)  # fmt: skip
ABSENT = {"backend=nccl", "backend=efa", "backend=smddp", "backend=neuron", "precision=tf32", "logger=wandb",
          "logger=mlflow", "data=hub"}  # fmt: skip
"""Refused here whatever else is said."""


def options(group: str) -> list[str]:
    """The choices of a group that a test can afford."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    affordable = [name for name in names if group != "model" or f"model={name}" in NEEDED]
    return [name for name in affordable if f"{group}={name}" not in ABSENT]


IMAGES = ("images", "digits")
GROUPS = ("strategy", "backend", "model", "data", "optimizer", "schedule", "precision", "logger", "hooks")
DEFAULTS = {"strategy": "ddp", "backend": "auto", "model": "llama_tiny", "data": "text", "optimizer": "adamw",
            "schedule": "cosine", "precision": "fp32", "logger": "[]", "hooks": "[quitter]"}  # fmt: skip


def words_of(choices: dict[str, str]) -> list[str]:
    """A command line that chooses these, and says what they need."""
    found = [f"{group}={option}" for group, option in choices.items()]
    needed = [word for choice in found for word in NEEDED.get(choice.replace(",quitter", ""), [])]
    length = [] if choices["data"] in ("mixture", *IMAGES) else ["data.length=16"]
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


INTS = (1, 1, 2, 2, 4, 8, 16, 0, -1, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63))
FLOATS = (0.1, 0.5, 0.9, 1e-3, 1.0, 2.0, 0.0, -0.0, -0.5, 1e-300, 1e300, "nan", "inf", "-inf")
LETTERS = "ab_1 .,:;/\\'\"()[]{}<>$%&=~+-*#@!?|éß漢字🙂\u200b\u00a0"
WRONG = ("null", "true", "[]", "{}", "{a: 1}", "[null]", "[[1]]", "''", "???", "${seed}", "${nothing}",
         "${oc.env:HOME}", "1e999", "0x10", "1_0", "x y", "'\"'", "\\", "[", "a,b", "é", "..",
         "-", "x" * 5000)  # fmt: skip


def text(rng: Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randrange(10)))


def literal(value: Any) -> str:
    """As one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def value_of(rng: Random, key: str, kind: Any) -> str:
    """What one might give for a key: fitting its type, at its edges, and not at all."""
    if key in ELSEWHERE:
        return rng.choice(ELSEWHERE_VALUES)
    if rng.random() < 0.15:
        return rng.choice([*WRONG, text(rng)])
    if key in LENGTHY:
        return str(rng.randint(-1, 3))
    member = rng.choice(typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))
    if member is int:
        return str(rng.choice(INTS))
    if member is float:
        return str(rng.choice([*FLOATS, *INTS]))
    if member is bool:
        return rng.choice(["true", "false"])
    if member is str:
        return literal(text(rng))
    if member is type(None):
        return "null"
    if isinstance(member, type) and issubclass(member, Enum):
        return rng.choice([each.name for each in member])
    if typing.get_origin(member) is list:
        return literal([rng.choice([text(rng), rng.choice(INTS)]) for _ in range(rng.randrange(3))])
    return rng.choice([str(rng.choice(INTS)), str(rng.choice(FLOATS)), literal(text(rng))])


def drawn(rng: Random) -> tuple[list[str], list[str]]:
    """A command line, and the groups and keys that it has changed."""
    choices = dict(DEFAULTS)
    changed = rng.sample(GROUPS, rng.choice([0, 1, 1, 2]))
    for group in changed:
        option = rng.choice(options(group))
        choices[group] = {"logger": f"[{option}]", "hooks": f"[{option},quitter]"}.get(group, option)
    if choices["data"] in IMAGES and "model" not in changed:
        choices["model"] = "vit_tiny"
    words = words_of(choices)
    for key, kind in rng.sample(keys_of(tuple(choices.items())), rng.choice([1, 1, 2])):
        sign = rng.choice(["", "+", "++", "~"]) if rng.random() < 0.1 else ""
        name = f"{key}x" if rng.random() < 0.04 else key
        words.append(f"{sign}{name}" if sign == "~" else f"{sign}{name}={value_of(rng, key, kind)}")
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
    for number in range(20):
        photo = folder / "photos" / f"kind{number % 2}" / f"{number}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 8), 10 * number).save(photo)
    library = folder / "library"
    library.mkdir()
    for number in range(40):
        (library / f"module{number}.py").write_text(text[40 * number : 40 * number + 400])
    return folder


@pytest.fixture(scope="module")
def attempt(workers: Workers, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Start]:
    """A start with these words: a function, since Hypothesis prints all of what a test is given."""

    def attempt(words: list[str]) -> Start:
        own = tmp_path_factory.mktemp("own")
        places = [f"run.dir='{own}/run'", f"cache='{files}/cache'"]
        given_words = [word.replace("{files}", str(files)).replace("{own}", str(own)) for word in words]
        quiet = {"TORCH_COMPILE_DISABLE": "1"}  # a compiler takes longer than a run
        [found] = workers.run(
            fuzzed, 1, [*places, *given_words], str(files / "library"), environment=quiet, timeout=3 * MOST_S
        )
        shutil.rmtree(own)
        return found

    return attempt


@pytest.mark.timeout(180 + 5 * NUM_EXAMPLES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch's own, where it compiles
@settings(
    max_examples=NUM_EXAMPLES or 40,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    database=None,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**32 - 1))
def test_start_of_any_configuration_runs_or_is_refused_in_one_line(
    attempt: Callable[[list[str]], Start], seed: int
) -> None:
    words, changed = drawn(Random(seed))
    found = attempt(words)
    event(f"exit code {found.code}")
    wrong = problem(found, changed)
    assert wrong is None, f"{wrong}, seed {seed}: {words[-2:]} of {words}\n{found.err[-3000:]}"
