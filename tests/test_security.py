"""What a stranger's file can make a run do (nothing), what of a secret a run writes down (nothing), and from where.

That sockets are on loopback is in `tests/trainer/test_liveness.py`; what the sources may not say, in
`tests/test_layers.py`; evil checkpoints, also in `tests/faults/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strategies.testing import JobError, Workers
from tests.faults.damage import MARK, find, seal_evil, write
from tests.starts import start
from tests.test_cli import environment
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY
from trainer.checkpoint.manifest import NAME, Manifest
from trainer.checkpoint.metadata import _ALLOWED
from trainer.checkpoint.store import open_store
from trainer.commands.report import main as report

PLANTED = {
    "HF_TOKEN": "hf_planted0token",
    "AWS_SECRET_ACCESS_KEY": "planted/access+key",
    "WANDB_API_KEY": "planted-api-key",
    "DATABASE_PASSWORD": "planted password",
}
IN_CONFIG = ("planted-in-config", "planted-in-address")
RUN = ("trainer.max_steps=4", "trainer.eval_every=2", "checkpoint.every=2", "logger=[tensorboard,csv]")


# Secrets.


def files_with(folder: Path, secrets: list[str]) -> list[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("size", [1, 2])
def test_run_writes_no_secret(workers: Workers, tmp_path: Path, size: int) -> None:
    run = tmp_path / "run"
    words = [*TINY, *RUN, f"run.dir={run}", f"cache={tmp_path}/cache", f"trainer.api_token={IN_CONFIG[0]}",
             f"trainer.server=https://me:{IN_CONFIG[1]}@host/path"]  # fmt: skip
    secrets = [*PLANTED.values(), *IN_CONFIG]

    def begin(*more: str) -> Any:
        return workers.run(start, size, [*words, *more], (), "Tattler", environment=PLANTED, timeout=60)

    assert [each.code for each in begin()] == [0] * size
    assert [each.code for each in begin("trainer.max_steps=6")] == [0] * size
    with pytest.raises(JobError, match="failed with"):
        begin("trainer.max_steps=8", "trainer.fail_at=1")
    assert report_of(run) == 0
    assert (run / "report.html").is_file()
    log = (run / "logs" / "rank-0.log").read_text()
    assert "the token is ***" in log, "what is hidden was there to hide"
    assert "failed with *** at https://***@host/path, ***" in log
    assert files_with(tmp_path, secrets) == []
    assert list(tmp_path.rglob("*.distcp")), "and those were looked at"


def report_of(run: Path) -> int:
    from trainer.commands.report import parser

    return report(parser().parse_args([str(run)]))


# Strangers' files.


WATCH = """
import json, os, sys, threading
names = []
def heard(event, arguments):
    if event == "pickle.find_class":
        names.append(".".join(map(str, arguments)))
sys.addaudithook(heard)
sys.path.insert(0, {root!r})
from trainer import run
try:
    run()
finally:
    open(f"pickled-{{os.environ['RANK']}}", "w").write(json.dumps(names))
"""


def allowed(name: str) -> bool:
    """One of the few classes that an index is made of, or a dtype; none of them does anything when it is made."""
    module, _, attribute = name.rpartition(".")
    return (module, attribute) in _ALLOWED or isinstance(getattr(torch, attribute, None), torch.dtype)


def test_run_and_resume_unpickle_only_the_index_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WATCH.format(root=str(ROOT)))
    for steps in (4, 6):
        words = [sys.executable, "scripts/launch.py", "--nproc-per-node", "2", "--script", str(tmp_path / "script.py")]
        words += [*TINY, *RUN, f"trainer.max_steps={steps}", f"run.dir={tmp_path}/run", f"cache={tmp_path}/cache"]
        words[1] = str(ROOT / words[1])
        ended = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        for rank in (0, 1):
            names = json.loads((tmp_path / f"pickled-{rank}").read_text())
            assert [name for name in names if not allowed(name)] == []
            assert bool(names) == (steps == 6), "read on resume, and only then"


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ[MARK],))


def evil_tokens(folder: Path) -> list[str]:
    np.save(folder / "evil.npy", np.array([Evil()], dtype=object))
    return ["data=tokens", f"data.paths=[{folder}/evil.npy]", "data.boundary=0"]


def evil_weights(folder: Path) -> list[str]:
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 259}  # fmt: skip
    (folder / "evil").mkdir()
    (folder / "evil" / "config.json").write_text(json.dumps(config))
    torch.save({"model.norm.weight": Evil()}, folder / "evil" / "pytorch_model.bin")
    return [f"model.path={folder}/evil"]


def evil_code(folder: Path) -> list[str]:
    (folder / "evil").mkdir()
    (folder / "evil" / "config.json").write_text('{"model_type": "m", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "evil" / "mine.py").write_text(f"import os; os.mkdir(os.environ[{MARK!r}])\n")
    return [f"model.path={folder}/evil"]


@pytest.mark.parametrize("plant", [evil_tokens, evil_weights, evil_code])
def test_evil_input_is_refused_and_not_run(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], list[str]]
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    others = [word for word in TINY if not word.startswith(("model.", "data"))]
    needed = ["model=llama_tiny", "data=text", f"data.paths=[{ROOT}/strategies/base.py]", "data.length=16"]
    given = plant(tmp_path)
    kept = [word for word in needed if word.partition("=")[0] not in {each.partition("=")[0] for each in given}]
    if any(word.startswith("model.path") for word in given):
        kept[0] = "model=hf"
    words = [*others, *kept, *given, f"run.dir={tmp_path}/run", f"cache={tmp_path}/cache"]
    [found] = workers.run(start, 1, words, environment={MARK: str(tmp_path / "ran")}, timeout=60)
    assert not (tmp_path / "ran").exists(), "it ran"
    assert found.code == 2, found
    assert found.err.startswith("ConfigError: ")
    assert found.err.count("\n") == 1


@dataclass(frozen=True)
class Planting:
    """Where in a checkpoint something evil lies."""

    part: str
    sealed: bool
    """With a manifest that says so: what a liar can make."""


PLANTINGS = {
    "index": Planting(".metadata", sealed=False),
    "index, sealed": Planting(".metadata", sealed=True),
    "shard": Planting("__0_0.distcp", sealed=False),
    "shard, sealed": Planting("__0_0.distcp", sealed=True),
    "state": Planting("state.json", sealed=False),
}


@pytest.mark.parametrize("name", PLANTINGS)
def test_evil_checkpoint_is_not_run(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    planting, run = PLANTINGS[name], tmp_path / "run"
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    words = [*TINY, "trainer.max_steps=2", f"run.dir={run}", f"cache={tmp_path}/cache"]
    [begun] = workers.run(start, 1, words, timeout=60)
    assert begun.code == 0, begun.err
    store = open_store(str(run / "checkpoints"))
    if planting.part == ".metadata" and planting.sealed:
        seal_evil(store, 2)
    else:
        path = find(store, 2, planting.part)
        torch.save({"model": Evil()}, tmp_path / "evil.pt")
        write(store, path, (tmp_path / "evil.pt").read_bytes())
        if planting.sealed:
            folder = path.split("/")[0]
            manifest = Manifest.parse(store.read(f"{folder}/{NAME}"), 2)
            manifest.files[path.removeprefix(f"{folder}/")] = (store.sizes(folder)[path], store.digest(path))
            write(store, f"{folder}/{NAME}", manifest.to_bytes())
    [found] = workers.run(
        start, 1, [*words, "trainer.max_steps=4"], environment={MARK: str(tmp_path / "ran")}, timeout=60
    )
    assert not (tmp_path / "ran").exists(), "it ran"
    assert found.code == 2, found
    assert found.err.startswith("ConfigError: ")
