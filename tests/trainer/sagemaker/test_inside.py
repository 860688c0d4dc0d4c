"""A start inside of a SageMaker training job: what arrives, where things lie afterwards, what its failure says."""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from strategies.testing import Workers
from tests.starts import Start, start
from tests.trainer.jobs import ROWS, TINY
from trainer.checkpoint.store import FolderStore
from trainer.sagemaker.environment import put_right
from trainer.sagemaker.failure import write_failure
from trainer.sagemaker.hyperparameters import MOST_CHARACTERS, overrides_of, packed, written
from trainer.sagemaker.job import channel_overrides, words_of

TEXT = "To be, or not to be, that is the question. " * 60


def hyperparameters(words: tuple[str, ...], *left_out: str) -> dict[str, Any]:
    """Words of a test as somebody would type them into a form."""
    pairs = (word.split("=", 1) for word in words)
    return {name: value for name, value in pairs if name not in left_out}


FORM = hyperparameters(TINY, "data.paths", "trainer.max_steps") | {"trainer.max_steps": 2}
OWN = hyperparameters(ROWS) | {"trainer.max_steps": 2, "schedule": "constant"}


@dataclass(kw_only=True)
class Job:
    """A training job's folders and variables."""

    base: Path
    given: Mapping[str, Any]
    channels: Mapping[str, str | None] = field(default_factory=lambda: {"train": TEXT})
    """Text of the one file of each; None: the folder is empty."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        for name, text in self.channels.items():
            folder = self.base / "input" / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (folder / "a.txt").write_text(text)
        (self.base / "checkpoints").mkdir(parents=True, exist_ok=True)
        return {
            "SM_HPS": json.dumps(self.given),
            "SM_CHANNELS": json.dumps(list(self.channels)),
            "SM_HOSTS": '["algo-1"]',
            "SM_CURRENT_HOST": "algo-1",
            "SM_OUTPUT_DIR": str(self.base / "output"),
            "SAGEMAKER_BASE_DIR": str(self.base),
            **self.variables,
        }

    def run(
        self, workers: Workers, size: int = 1, trainer: str = "Trainer", words: tuple[str, ...] = ()
    ) -> list[Start]:
        return workers.run(start, size, list(words), (), trainer, environment=self.environment(), timeout=60)

    @property
    def failure(self) -> str:
        path = self.base / "output" / "failure"
        return path.read_text() if path.exists() else ""

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.base / "checkpoints" / "config.yaml").read_text())
        return found


# What arrives.

EVERY_TYPE = {
    "trainer.max_steps": 2,
    "optimizer.lr": 3e-3,
    "deterministic": True,
    "trainer.clip_norm": None,
    "data.pattern": "*.txt",
    "data.exclude": ["it's.txt", "a b.txt", "x,y=z.txt"],
    "model.config": {"hidden_size": 16, "intermediate_size": 24},
    "model.config.rope_parameters": {"rope_type": "default", "rope_theta": 500.5},
    "hooks": [],
    "logger": ["csv"],
}
ARRIVED = {
    "model.config.intermediate_size": 24,
    "trainer.max_steps": 2,
    "optimizer.lr": 3e-3,
    "deterministic": True,
    "trainer.clip_norm": None,
    "data.pattern": "*.txt",
    "data.exclude": ["it's.txt", "a b.txt", "x,y=z.txt"],
}


def at(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("how", ["typed", "texts", "packed"])
def test_hyperparameters_of_every_type_arrive(workers: Workers, tmp_path: Path, how: str) -> None:
    given: dict[str, Any] = {**FORM, **EVERY_TYPE, "sagemaker_program": "train.py", "_tuning_objective_metric": "loss"}
    if how == "texts":
        given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    if how == "packed":
        given = packed([f"{name}={written(value)}" for name, value in {**FORM, **EVERY_TYPE}.items()])
    job = Job(base=tmp_path, given=given)
    [ended] = job.run(workers, words=("--trainer.max_steps", "9", "--optimizer.lr", "name=1", "seed=7"))
    assert ended.code == 0, ended.err
    config = job.config()
    assert {key: at(config, key) for key in ARRIVED} == ARRIVED
    assert config["model"]["config"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.5}
    assert config["seed"] == 7, "what no toolkit made of hyperparameters counts"
    assert list(config["logger"]) == ["csv"]
    assert config["data"]["paths"] == [str(tmp_path / "input" / "data" / "train")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "it's",
        "'",
        "\\",
        "a\\'b",
        "\\\\",
        "a,b",
        "[x",
        "{",
        "${x",
        "null",
        "True",
        "a=b",
        "x y",
        "ä\n",
        "'a'",
        '"',
        "-1x",
    ],
)
def test_any_text_is_read_back_from_an_override(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [override] = OverridesParser.create().parse_overrides([f"key={written([text])}"])
    assert [str(value) for value in override.value()] == [text]  # type: ignore[union-attr]


def test_packed_takes_pieces_that_the_service_takes_and_says_which_is_missing() -> None:
    words = [f"data.paths=[{'x' * 5000}]", "run.name='it''s'"]
    pieces = packed(words)
    assert len(pieces) > 2
    assert max(map(len, pieces.values())) <= MOST_CHARACTERS
    assert overrides_of({**pieces, "optimizer.lr": "0.1"}) == [*words, "optimizer.lr=0.1"]
    with pytest.raises(Exception, match="don't hold a whole configuration"):
        overrides_of({name: piece for name, piece in pieces.items() if name != "shardwright_1"})
    with pytest.raises(Exception, match="don't hold a whole configuration"):
        overrides_of({"shardwright_0": base64.b64encode(b"{").decode()})


def test_words_of_leaves_out_what_toolkits_make() -> None:
    arguments = ["--a", "1", "--opt", "name=adam,wd=0.1", "-b", "2", "--flag=x", "seed=3", "--last", "resume=never"]
    assert words_of(arguments) == ["seed=3"]


@pytest.mark.parametrize(
    ("data", "channels", "words", "unused"),
    [
        ({"paths": "???", "validation_paths": []}, ("train",), ["data.paths=[{train}]"], []),
        ({"path": "json", "files": "???"}, ("training",), ["data.files=['{training}/**/*']"], []),
        (
            {"path": "???", "validation_path": None},
            ("train", "test"),
            ["data.path={train}", "data.validation_path={test}"],
            [],
        ),
        ({"paths": ["mine.txt"]}, ("train",), [], ["train"]),
        ({"files": []}, ("proteins",), ["data.files=['{proteins}/**/*']"], []),
        ({"length": 3}, ("train",), [], ["train"]),
        ({"paths": "???"}, ("train", "extra"), ["data.paths=[{train}]"], ["extra"]),
    ],
)
def test_channels_fill_in_what_nobody_gave(
    tmp_path: Path, data: dict[str, Any], channels: tuple[str, ...], words: list[str], unused: list[str]
) -> None:
    folders = {name: tmp_path / name for name in channels}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").touch()
    expected = [word.format(**folders) for word in words]
    assert channel_overrides(folders, data) == (expected, unused)


def test_model_record_and_checkpoints_lie_where_sagemaker_keeps_them_and_a_second_start_goes_on(
    workers: Workers, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    warm = {"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tmp_path / "warm")}
    job = Job(base=tmp_path / "ml", given=FORM, variables=warm)
    first = job.run(workers, 2)
    assert [ended.code for ended in first] == [0, 0], first[0].err
    assert "started by RANK and WORLD_SIZE: 2 processes" in first[0].out
    assert (tmp_path / "warm" / "shardwright").is_dir()
    [second] = Job(base=tmp_path / "ml", given={**FORM, "trainer.max_steps": 4}, variables=warm).run(workers)
    assert second.code == 0, second.err
    assert "going on from" in second.out
    record = (tmp_path / "ml" / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in record] == [1, 2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ml" / "model")
    assert model.config.hidden_size == 16
    assert job.failure == ""


def test_own_model_is_delivered_by_its_own_names(workers: Workers, tmp_path: Path) -> None:
    from safetensors import safe_open

    job = Job(base=tmp_path, given=OWN, channels={})
    [ended] = job.run(workers, trainer="Rows")
    assert ended.code == 0, ended.err
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "3.bias", "3.weight"]


# What its failure says.


def with_full_disk(words: list[str], unset: tuple[str, ...], trainer: str) -> Start:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(FolderStore, "create", full):
        return start(words, unset, trainer)


def without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "unknown key": ({"given": {**FORM, "optimizer.lrate": 0.1}}, {}, ["ConfigError", "optimizer.lrate", "Choices: "]),
    "wrong type": ({"given": {**FORM, "trainer.max_steps": "many"}}, {}, ["ConfigError", "trainer.max_steps", "many"]),
    "name that is no key": ({"given": {**FORM, "d e": 1}}, {}, ["ConfigError", "'d e' is no key"]),
    "missing channel": ({"given": FORM, "channels": {}}, {}, ["ConfigError", "data.paths"]),
    "empty channel": ({"given": FORM, "channels": {"train": None}}, {}, ["ConfigError", "channel train has no file"]),
    "pieces missing": ({"given": {"shardwright_1": "eA=="}}, {}, ["ConfigError", "shardwright_1"]),
    "batch that ranks can't share": (
        {"given": {**OWN, "trainer.global_batch": 3}, "channels": {}}, {"size": 2, "trainer": "Rows"},
        ["ConfigError", "global_batch=3 can't be shared by 2 ranks"],
    ),
    "machine without the library": (
        {"given": {**FORM, "backend": "smddp"}, "variables": {"SM_CURRENT_INSTANCE_TYPE": "ml.p5.48xlarge"}}, {},
        ["ConfigError", "backend=smddp is for p4d.24xlarge", "p5.48xlarge"],
    ),
    "hosts that aren't there": (
        {"given": FORM, "variables": {"SM_CURRENT_HOST": "algo-7"}}, {"alone": True},
        ["ConfigError", "SM_CURRENT_HOST='algo-7'"],
    ),
    "hyperparameters that aren't JSON": ({"given": FORM, "variables": {"SM_HPS": "{"}}, {}, ["ConfigError", "SM_HPS"]),
    "crash on one rank": (
        {"given": {**FORM, "trainer.fail_at": 2, "trainer.api_token": "hush-hush"},
         "variables": {"AWS_SECRET_ACCESS_KEY": "shh-shh-shh", "HF_TOKEN": "psst-psst"}},
        {"size": 2, "trainer": "Tattler"}, ["Error: ", "failed with ***", "***"],
    ),
    "full disk": ({"given": OWN, "channels": {}}, {"size": 2, "trainer": "Rows", "function": with_full_disk},
                  ["ConfigError", "No space left on device"]),
    "model that can't be written": (
        {"given": OWN, "channels": {}, "variables": {"SM_MODEL_DIR": "/dev/null/model"}},
        {"size": 2, "trainer": "Rows"}, ["ConfigError", "model can't be written to /dev/null/model", "SM_MODEL_DIR"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_failure_says_in_its_first_characters_what_was_wrong(workers: Workers, tmp_path: Path, case: str) -> None:
    made, how, parts = FAILURES[case]
    job = Job(base=tmp_path, **made)
    function, size, trainer = how.get("function", start), how.get("size", 1), how.get("trainer", "Trainer")
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if how.get("alone") else ()
    ended = workers.outcomes(function, size, [], unset, trainer, environment=job.environment(), timeout=60)
    codes = {outcome.value.code if outcome.error is None else outcome.error for outcome in ended}
    assert 0 not in codes
    for part in parts:
        assert part in job.failure[:200]
    assert "hush-hush" not in job.failure
    assert "\n" not in job.failure


def test_failure_that_is_there_is_left_alone(tmp_path: Path) -> None:
    variables = {"SM_HPS": "{}", "SM_OUTPUT_DIR": str(tmp_path)}
    write_failure("first", variables)
    write_failure("second", variables)
    write_failure("outside", {})
    assert (tmp_path / "failure").read_text() == "first"


# What launchers have set.


def test_put_right_takes_away_what_launchers_set_and_nothing_else() -> None:
    old = {"NCCL_PROTO": "simple", "RDMAV_FORK_SAFE": "1", "NCCL_MIN_NRINGS": "4", "NCCL_DEBUG": "WARN"}
    inside = {"SM_HPS": "{}"}
    variables = {**old, **inside}
    said = put_right(variables)
    assert variables == {"NCCL_DEBUG": "WARN", **inside}
    assert len(said) == 3
    assert said[0].startswith("NCCL_PROTO=simple, set by SageMaker's launcher, is taken away")
    for kept in ({**inside, "NCCL_PROTO": "LL128"}, {**old, **inside, "SHARDWRIGHT_KEEP_ENVIRONMENT": "1"}, dict(old)):
        before = dict(kept)
        assert put_right(kept) == []
        assert kept == before


def test_put_right_points_caches_at_what_a_warm_pool_keeps() -> None:
    variables = {"SM_HPS": "{}", "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": "/warm", "HF_HOME": "/mine"}
    [said] = put_right(variables)
    assert variables["TORCHINDUCTOR_CACHE_DIR"] == "/warm/inductor"
    assert variables["HF_HOME"] == "/mine"
    assert "HF_HOME" not in said


def test_put_right_tells_gloo_the_interface_between_hosts() -> None:
    hosts = {"SM_HPS": "{}", "SM_NETWORK_INTERFACE_NAME": "eth0", "SM_HOSTS": '["algo-1", "algo-2"]'}
    variables = dict(hosts)
    [said] = put_right(variables)
    assert variables == {**hosts, "GLOO_SOCKET_IFNAME": "eth0"}
    assert "GLOO_SOCKET_IFNAME=eth0" in said
    for alone in ({**hosts, "SM_HOSTS": '["algo-1"]'}, {**hosts, "GLOO_SOCKET_IFNAME": "ib0"}):
        assert put_right(alone) == []
