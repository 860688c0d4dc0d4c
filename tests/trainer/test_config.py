"""The configuration: every YAML builds, and whatever is wrong is said in one line with the nearest names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.complaints import CONF
from trainer.config import compose, compose_launcher, made, refuse_wrong, restored
from trainer.launch import Launcher, SageMakerLauncher
from trainer.launch.sagemaker_parts import channel
from trainer.run_folder import differences, run_name
from trainer.secrets import redacted, redacted_words

GROUPS = {path.parent.name: [] for path in CONF.glob("*/*.yaml")}
for _path in sorted(CONF.glob("*/*.yaml")):
    GROUPS[_path.parent.name].append(_path.stem)


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in GROUPS.items() for option in options]
)
def test_compose_every_yaml_gives_an_object(group: str, option: str) -> None:
    file = ["data.files=[x.jsonl]"]
    needed = {"hub": ["data.path=squad"], "jsonl": file, "parquet": file, "messages": file, "hf": ["model.path=x"],
              "text": ["data.paths=[x]"], "tokens": ["data.paths=[x]"], "images": ["data.path=x"],
              "mlm_esm_gpu": file, "vit_images_gpu": ["data.path=x"]}.get(option, [])  # fmt: skip
    if group == "launcher":  # has a root of its own
        assert isinstance(compose_launcher([f"launcher={option}"]), Launcher)
        return
    choice = f"{group}=[{option}]" if group in ("logger", "hooks") else f"{group}={option}"
    config = compose([choice, *needed])
    for name in config:
        if hasattr(config[name], "keys"):
            made(config[name])


def test_compose_default_is_the_public_surface() -> None:
    config = compose([])
    for key in ("max_steps", "global_batch", "micro_batch", "log_every", "eval_every"):
        assert key in config.trainer
    assert config.resume == "auto"
    assert config.seed == 0


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.max_step=3"], ["trainer.max_step", "Nearest: max_steps"]),
        (["+trainer.max_step=3"], ["trainer.max_step", "Nearest: max_steps"]),
        (["stratgy=ddp"], ["stratgy", "Nearest: strategy"]),
        (["strategy=dpp"], ["strategy=dpp", "Nearest: ddp"]),
        (["strategy.hook=bf17"], ["strategy.hook", "bf17", "bf16"]),
        (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
        (["trainer.global_batch=1.5"], ["trainer.global_batch", "1.5"]),
        (["optimizer.lr=[1]"], ["optimizer.lr"]),
        (["optimizer.betas=x"], ["optimizer.betas"]),
        (["model=llama_tny"], ["model=llama_tny", "llama_tiny"]),
        (["hooks=[]", "hooks.samples.length=3"], ["hooks.samples", "Choose it with hooks=[samples]"]),
        (["logger=[tensorbord]"], ["tensorbord", "tensorboard"]),
        (["experiment=nothing"], ["experiment=nothing", "lora_answers"]),
        (["strategy.hook=["], ["strategy.hook=["]),
        (["seed"], ["seed"]),
        (["logger=0"], ["logger=[a,b]", "csv"]),
        (["optimizer.lr=${nothing}"], ["optimizer.lr", "nothing"]),
        (["seed=${seed}"], ["seed", "ecursive"]),
        (["strategy.hook=${seed}"], ["strategy.hook", "bf16"]),
    ],
)
def test_compose_mistake_is_one_line_that_names_it(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


KEYS = ("trainer.global_batch", "trainer.clip_norm", "trainer.max_epochs", "trainer.max_time", "trainer.on_nonfinite",
        "trainer.ema_decay", "optimizer.lr", "optimizer.beta2", "schedule.warmup", "strategy.bucket_mb",
        "strategy.hook", "checkpoint.keep", "checkpoint.every", "precision.loss_scale", "data.length",
        "data.validation", "model.config", "backend.timeout_s", "run.dir", "run.name", "resume", "seed", "logger",
        "hooks")  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(KEYS),
    value=st.one_of(
        st.integers(-3, 3),
        st.floats(-2, 2),
        st.sampled_from(
            ["null", "true", "[]", "{}", "{a: 1}", "x y", "", "1e999", "-0", "nan", "???", "${seed}", "${nothing}"]
        ),
    ),
)
def test_compose_any_value_is_taken_or_refused_in_one_line(key: str, value: object) -> None:
    try:
        config = compose([f"{key}={value}"])
        for name in config:
            if hasattr(config[name], "keys"):
                made(config[name])
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert re.match(r"\w+: ", str(error))  # noqa: PT017


def test_refuse_wrong_missing_value_names_the_key() -> None:
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match=r"a\.b"):
        refuse_wrong(OmegaConf.create({"a": {"b": "???"}}))


def test_restored_never_runs_a_target(tmp_path: Path) -> None:
    from strategies.precision import Precision

    mark = tmp_path / "ran"
    with pytest.raises(ConfigError):
        restored(Precision, {"_target_": "pathlib.Path.touch", "self": str(mark)})
    assert not mark.exists()


def test_run_name_same_job_same_name() -> None:
    first = {"model": {"n": 1}, "data": {}, "seed": 0, "trainer": {"global_batch": 8, "max_steps": 10}}
    longer = {**first, "trainer": {"global_batch": 8, "max_steps": 99}}
    other = {**first, "seed": 1}
    choices = {"model": "llama_tiny", "data": "python_stdlib"}
    assert run_name(first, choices) == run_name(longer, choices)
    assert run_name(first, choices) != run_name(other, choices)
    assert run_name(first, choices).startswith("llama_tiny-python_stdlib-")


def test_redacted_secrets_are_gone() -> None:
    config = {"logger": {"wandb": {"api_key": "s3cret", "project": "p"}}, "token": "t", "data": {"tokens": 5}}
    clean = redacted(config)
    assert "s3cret" not in str(clean)
    assert clean["token"] == "***"
    assert clean["logger"]["wandb"]["project"] == "p"
    assert clean["data"]["tokens"] == 5


def test_redacted_words_secrets_of_the_command_line_are_gone() -> None:
    words = [
        "train.py",
        "logger.wandb.api_key=s3cret",
        "+logger.mlflow={password: s3cret, uri: x}",
        "trainer.max_tokens=9",
        "logger.mlflow.uri=https://me:s3cret@host/path",
        "data.tokenizer=bytes",
        "optimizer.lr=1e-3",
    ]
    clean = redacted_words(words)
    assert "s3cret" not in " ".join(clean)
    assert clean[3:4] + clean[5:] == ["trainer.max_tokens=9", "data.tokenizer=bytes", "optimizer.lr=1e-3"]
    assert clean[1] == "logger.wandb.api_key=***"
    assert clean[4] == "logger.mlflow.uri=https://***@host/path"


def test_differences_names_each_leaf() -> None:
    old = {"a": {"b": 1, "c": 2}, "gone": 1}
    new = {"a": {"b": 1, "c": 3}, "new": [1]}
    assert differences(old, new) == ["a.c: 2 -> 3", "gone: 1 -> (absent)", "new: (absent) -> [1]"]


def test_differences_of_another_choice_leave_out_the_keys_of_one_class_only() -> None:
    old, new = {"strategy": {"both": 1, "bucket_mb": 25}}, {"strategy": {"both": 2, "wrap": ["Layer"]}, "other": 1}
    assert differences(old, new, ["strategy"]) == ["other: (absent) -> 1", "strategy.both: 1 -> 2"]


def test_compose_experiment_may_be_written_with_a_plus() -> None:
    assert compose(["+experiment=lora_answers"]) == compose(["experiment=lora_answers"])


@pytest.mark.parametrize(
    "words",
    [
        ["launcher.tags.team=nlp", "launcher.channels.train=s3://data/x"],
        ["launcher.tags={team:nlp}", "launcher.channels={train:'s3://data/x'}"],
        ["launcher.tags.team=nlp", "launcher.channels.train.uri=s3://data/x"],
        ["++launcher.tags.team=nlp", "+launcher.channels.train={uri:'s3://data/x'}"],
    ],
)
def test_dictionary_may_be_given_whole_or_by_its_keys(words: list[str]) -> None:
    launcher = compose_launcher(["launcher=sagemaker", *words])
    assert isinstance(launcher, SageMakerLauncher)
    assert launcher.tags == {"team": "nlp"}
    assert channel("train", launcher.channels["train"]).uri == "s3://data/x"
