from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from strategies.errors import ConfigError
from tests.trainer.data.helpers import build, small_tokenizer, tokens_of
from trainer.data import SCHEMAS, Order, Packing
from trainer.data.base import AbstractData
from trainer.data.mixture import MixtureData
from trainer.data.text import PythonStdlibData, TextData

CONF = Path(__file__).parents[3] / "conf"


def part(tmp_path: Path, name: str, **settings: Any) -> TextData:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{name} {number}")
    return TextData(paths=[str(folder)], packing=Packing.none, **settings)


def test_mixture_joins_its_sources_for_an_order_by_weight(tmp_path: Path) -> None:
    sources: dict[str, AbstractData] = {name: part(tmp_path, name, validation=0.3) for name in ("one", "two")}
    data = build(MixtureData(sources=sources, weights={"one": 3, "two": 1}), tmp_path / "c")
    (one, heavy), (two, light) = data.sources
    assert (heavy, light) == (3, 1)
    assert len(data.train) == one + two
    words = [bytes(tokens[1:4]).decode() for tokens in tokens_of(data.train)]
    assert words == ["one"] * one + ["two"] * two
    assert data.validation is not None
    assert len(data.validation) == 24 - one - two
    indices, _ = Order(0, data.sources).span(0, 1000)
    assert [words[index] for index in indices].count("one") == 750


@pytest.mark.parametrize(
    ("weights", "words"),
    [({"one": 1}, "'two' has no weight"), ({"one": 1, "two": 0}, "weight of 'two' is 0"), ({}, "has no weight"),
     ({"one": 1, "two": 1, "three": 1}, "'three' has a weight but no source")],
)  # fmt: skip
def test_mixture_weights_that_do_not_match_are_refused(weights: dict[str, float], words: str, tmp_path: Path) -> None:
    sources: dict[str, AbstractData] = {name: part(tmp_path, name) for name in ("one", "two")}
    with pytest.raises(ConfigError, match=words):
        MixtureData(sources=sources, weights=weights)


def test_mixture_of_different_tokenizers_is_refused(tmp_path: Path) -> None:
    sources: dict[str, AbstractData] = {
        "one": part(tmp_path, "one"),
        "two": part(tmp_path, "two", tokenizer=str(small_tokenizer(tmp_path / "t"))),
    }
    with pytest.raises(ConfigError, match="'one' and 'two' differ in their tokenizer"):
        build(MixtureData(sources=sources, weights={"one": 1, "two": 1}), tmp_path / "c")


@pytest.fixture(name="composed")
def _composed() -> Any:
    for schema in SCHEMAS:
        ConfigStore.instance().store(group="schema", name=schema.__name__, node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF / "data"), version_base=None):
        yield lambda name, *overrides: OmegaConf.to_object(compose(name, list(overrides)))
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("option", "overrides"),
    [
        ("python_stdlib", []),
        ("text", ["paths=[a.txt]"]),
        ("jsonl", ["files=[a.jsonl]"]),
        ("parquet", ["files=[a.parquet]"]),
        ("hub", ["path=name/of-set", "stream=true", "limit=5"]),
        ("tokens", ["paths=[a.bin]", "type=uint32"]),
        ("messages", ["files=[a.jsonl]", "packing=windows"]),
    ],
)
def test_options_make_their_class_and_refuse_other_keys(composed: Any, option: str, overrides: list[str]) -> None:
    assert isinstance(composed(option, *overrides), SCHEMAS)
    with pytest.raises(HydraException):
        composed(option, *overrides, "lenght=5")
    with pytest.raises(HydraException):
        composed(option, *overrides, "packing=tight")


def test_mixture_sources_are_options_with_their_own_schemas(tmp_path: Path, composed: Any) -> None:
    conf = tmp_path / "conf"
    (conf / "data").mkdir(parents=True)
    for file in (CONF / "data").glob("*.yaml"):
        (conf / "data" / file.name).write_text(file.read_text())
    (conf / "root.yaml").write_text("defaults:\n  - data: mixture\n  - _self_\n")
    GlobalHydra.instance().clear()
    more = ["+data@data.sources.notes=text", "data.sources.notes.paths=[notes]", "+data.weights.notes=0.5"]
    with initialize_config_dir(str(conf), version_base=None):
        mixture = OmegaConf.to_object(compose("root", more).data)
        assert isinstance(mixture, MixtureData)
        assert isinstance(mixture.sources["code"], PythonStdlibData)
        assert isinstance(mixture.sources["notes"], TextData)
        assert mixture.sources["notes"].paths == ["notes"]
        assert mixture.weights == {"code": 1.0, "notes": 0.5}
        for wrong in ("packing=tight", "pats=[x]", "length=long"):
            with pytest.raises(HydraException):
                compose("root", [*more, f"data.sources.notes.{wrong}"])
