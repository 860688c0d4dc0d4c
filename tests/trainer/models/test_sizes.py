"""The named sizes have as many parameters as their names say; counted without storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.data.tokenizers import make_tokenizer
from trainer.models.hf import HFModel, Objective

CONF = Path(__file__).resolve().parents[3] / "conf" / "model"
SIZES = {
    "llama_tiny": 0.86e6,
    "llama_25m": 25e6,
    "llama_1b": 1e9,
    "llama_8b": 8e9,
    "llama_70b": 70e9,
    "t5_small": 60e6,
    "t5_611m": 611e6,
    "t5_2b": 2e9,
    "t5_11b": 11e9,
    "gpt_175b": 175e9,
    "gpt_1t": 1e12,
    "bert_tiny": 0.7e6,
    "bert_large": 335e6,
    "t5_tiny": 1.4e6,
    "esm_tiny": 0.8e6,
    "esm2_650m": 650e6,
    "vit_tiny": 0.2e6,
    "vit_large": 304e6,
}


def read(name: str) -> HFModel:
    raw: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert raw.pop("defaults") == [{"/schema@_here_": "HFModel"}, "_self_"]
    return HFModel(**{**raw, "objective": Objective[raw["objective"]]})


@pytest.mark.parametrize("name", SIZES)
def test_named_size_has_the_parameters_of_its_name(name: str) -> None:
    model = read(name)
    model.prepare(make_tokenizer("amino_acids" if model.architecture == "esm" else "bytes"))
    with torch.device("meta"):
        module = model.make()
    count = sum(value.numel() for value in module.parameters())
    assert count == pytest.approx(SIZES[name], rel=0.1)


def test_every_yaml_of_the_group_is_tested() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {*SIZES, "hf"}
