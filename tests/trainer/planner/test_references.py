"""Predictions of `shardwright plan` beside published numbers; all of them: docs/planner-accuracy.md."""

from __future__ import annotations

import csv
from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.planner.accuracy import PAPER, REFERENCES, planned, rows
from trainer.commands.wanted import wanted_of
from trainer.config import compose, each_of
from trainer.planner.search import without_machines

GPT = ("model=hf", "model.architecture=gpt2")
MODELS = {  # with a vocabulary, and the first with a width, that the ranks don't divide
    "7.5B": (*GPT, "model.config={vocab_size: 50257, n_embd: 4128, n_layer: 36, n_head: 43}"),
    "128B": (*GPT, "model.config={vocab_size: 50257, n_embd: 12288, n_layer: 70, n_head: 96}"),
    "1T": ("model=gpt_1t",),
}
STAGES = {"zero1": "p_os_gb", "zero2": "p_os_g_gb", "zero3": "p_os_g_p_gb"}
GIB = 2**30


def table_1(model: str) -> list[dict[str, str]]:
    with (REFERENCES / "zero_table1.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["model"] == model]


@pytest.mark.parametrize("model", MODELS)
def test_plan_of_zero_paper_models_takes_what_table_1_says(model: str) -> None:
    keys = ["strategy=zero1", "precision=fp16", *MODELS[model]]
    wanted = wanted_of(keys, compose(keys), None, cast=True)
    wanted = replace(wanted, strategies={name: each for name, each in each_of("strategy").items() if name in STAGES})
    for row in table_1(model):
        found, _ = without_machines(wanted, int(row["dp"]))
        assert found.keys() == STAGES.keys()
        for stage, column in STAGES.items():
            footprint = found[stage].footprint
            states = footprint.weights_bytes + footprint.gradients_bytes + footprint.moments_bytes
            assert states / 1e9 == pytest.approx(float(row[column]), rel=0.02), (row["dp"], stage)


def test_plan_command_prints_what_table_1_says_of_a_trillion_parameters() -> None:
    found = planned(["--cast", "--ranks", "1024", "strategy=zero3", "precision=fp16", *MODELS["1T"]])
    [candidate] = found["candidates"]
    states = sum(candidate["bytes_per_rank"][kind] for kind in ("weights", "gradients", "moments"))
    assert states / 1e9 == pytest.approx(15.6, rel=0.02)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_plan_of_torchtitan_runs_is_near_what_was_published(compiled: bool) -> None:
    """Llama 3.1 8B on 8 and 128 H100s of 96 GB."""
    published = [row for row in rows() if row.name == "Llama 3.1 8B" and row.setting.endswith("compile") == compiled]
    assert [row.gpus for row in published] == [8, 128]
    keys = [key for key in published[0].keys if not key.startswith(("cluster.nodes=", "trainer.global_batch="))]
    for row, found in zip(published, planned([*keys, "--nodes", "1,16"])["candidates"], strict=True):
        assert row.memory_gib is not None
        assert row.tokens_per_s is not None
        assert found["devices"] == row.gpus
        assert found["fits"]
        assert found["bytes_per_rank"]["total"] / GIB == pytest.approx(row.memory_gib, rel=0.10)
        assert found["speed"]["tokens_per_s_per_device"] == pytest.approx(row.tokens_per_s, rel=0.15)


def fsdp_paper(*keys: str) -> list[dict[str, Any]]:
    """Candidates on the paper's machines."""
    found: list[dict[str, Any]] = planned([*PAPER, *keys])["candidates"]
    return found


@pytest.mark.parametrize("model", ["t5_611m", "t5_2b"])
def test_plan_of_t5_is_as_fast_with_ddp_as_with_fsdp(model: str) -> None:
    keys = (f"model={model}", "precision=fp32", "trainer.micro_batch=8", "trainer.activation_checkpointing=none")
    [ddp] = fsdp_paper("strategy=ddp", *keys)
    [fsdp] = fsdp_paper("strategy=fsdp_full", *keys)
    assert ddp["fits"]
    assert fsdp["fits"]
    assert ddp["speed"]["tokens_per_s"] == pytest.approx(fsdp["speed"]["tokens_per_s"], rel=0.10)


def test_plan_of_t5_11b_fits_with_fsdp_and_not_with_ddp() -> None:
    keys = ("model=t5_11b", "precision=fp32", "trainer.micro_batch=8", "trainer.activation_checkpointing=full")
    [ddp], [fsdp] = fsdp_paper("strategy=ddp", *keys), fsdp_paper("strategy=fsdp_full", *keys)
    assert not ddp["fits"]
    assert fsdp["fits"]


@pytest.mark.parametrize("batch", [8, 16])
def test_plan_of_t5_11b_loses_a_little_speed_from_8_to_512_devices(batch: int) -> None:
    keys = ("model=t5_11b", "precision=bf16", f"trainer.micro_batch={batch}", "trainer.activation_checkpointing=full")
    few, many = fsdp_paper("--cast", "--nodes", "1,64", "strategy=fsdp_full", *keys)
    assert (few["devices"], many["devices"]) == (8, 512)
    lost = 1 - many["speed"]["tflops_per_s_per_device"] / few["speed"]["tflops_per_s_per_device"]
    assert 0 < lost < 0.15
