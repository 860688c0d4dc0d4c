"""`strategy=auto`: what is chosen, that all ranks choose alike; and predictions beside what was measured."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor, nn

from strategies.activations import ActivationCheckpointing
from strategies.base import Batch, LossTerms, Strategy
from strategies.ddp import DDPStrategy
from strategies.deepspeed import DeepSpeedStrategy
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy
from strategies.precision import Precision
from strategies.single import SingleStrategy
from strategies.testing import Workers
from tests.starts import start
from tests.trainer.jobs import ROWS, TINY, Rows, fit, losses
from trainer.config import compose, made, strategy_names
from trainer.planner.auto import Auto, Seen, choose, chosen_words, machines_of, said
from trainer.planner.cluster import Cluster, Machines
from trainer.planner.efficiency import efficiency_of
from trainer.planner.facts import ModelFacts, facts_of
from trainer.planner.search import Wanted

SMALL = ("trainer.max_steps=5", "trainer.log_every=2", "data.length=16")
GIB = 2**30


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


# Whole runs.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_auto_picks_trains_and_says_what_it_predicted(workers: Workers, tmp_path: Path, size: int) -> None:
    run = tmp_path / "run"
    words = [*TINY, *SMALL, "strategy=auto", "trainer.micro_batch=null"]
    answers = workers.run(fit, size, str(run), words, timeout=120)
    assert [answer.get("reason") for answer in answers] == [answers[0]["reason"]] * size, answers
    config = yaml.safe_load((run / "config.yaml").read_text())
    first, *settings = config["auto"]
    chosen = first.removeprefix("strategy=")
    assert chosen in strategy_names()
    assert (chosen == "single") is (size == 1)
    assert settings == [f"trainer.micro_batch={config['trainer']['micro_batch']}"]
    assert 12 % (size * config["trainer"]["micro_batch"]) == 0
    log = (run / "logs" / "rank-0.log").read_text()
    assert f"strategy=auto: {first} " in log
    assert "runner-up: strategy=" in log
    assert f'"strategy": "{chosen}"' in (run / "events.jsonl").read_text()
    said = summary_of(run)
    assert set(said["predicted"]) == set(said["prediction_error_percent"]) == {"memory_bytes", "step_s"}
    for name, value in said["predicted"].items():
        error = 100 * (value / said["measured"][name] - 1)
        assert said["prediction_error_percent"][name] == pytest.approx(error)
    assert abs(said["prediction_error_percent"]["memory_bytes"]) < 15
    assert "predicted: " in log


def test_auto_gives_the_same_losses_as_the_strategy_that_it_chose(workers: Workers, tmp_path: Path) -> None:
    words = [*TINY, *SMALL]
    workers.run(fit, 2, str(tmp_path / "auto"), [*words, "strategy=auto"], timeout=120)
    chosen = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["auto"]
    workers.run(fit, 2, str(tmp_path / "named"), [*words, *chosen])
    assert losses(tmp_path / "auto") == losses(tmp_path / "named")
    [again] = workers.run(fit, 1, str(tmp_path / "auto"), [*words, "strategy=auto", "trainer.max_steps=7"])
    assert again["progress"]["step"] == 7, "it goes on, with another strategy"


@dataclass(kw_only=True)
class Plain(Rows):
    """Reads no values."""

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        counted = (batch.labels != -100).to(outputs.dtype)
        return LossTerms(loss=((outputs - batch.labels).square() * counted).sum())


@dataclass(kw_only=True)
class Scaled(Rows):
    """Its model reads values while it is made."""

    def make_model(self) -> nn.Module:
        model = super().make_model()
        float(next(model.parameters()).sum())
        return model


@pytest.mark.parametrize(
    ("trainer", "refused"), [(Plain, ""), (Rows, "Sequential or its loss can't run"), (Scaled, "Scaled.make_model")]
)
def test_auto_with_a_model_of_ones_own_needs_one_without_storage(
    workers: Workers, tmp_path: Path, trainer: type[Rows], refused: str
) -> None:
    [answer] = workers.run(fit, 1, str(tmp_path / "run"), [*ROWS, "strategy=auto"], trainer)
    if refused:
        assert answer["error"] == "ConfigError"
        assert refused in answer["message"]
        assert "such as strategy=ddp (strategy)." in answer["message"]
        assert "\n" not in answer["message"]
    else:
        assert summary_of(tmp_path / "run")["predicted"]["step_s"] > 0


def test_auto_where_nothing_fits_ends_every_rank_with_one_line_and_2(workers: Workers, tmp_path: Path) -> None:
    small = ("cluster=custom", "cluster.devices=2", "cluster.memory_gib=0.0001", "cluster.peak_tflops=1")
    words = [*TINY, *SMALL, "strategy=auto", *small, f"run.dir={tmp_path}/run", f"cache={tmp_path}/cache"]
    starts = workers.run(start, 2, words, timeout=120)
    assert [each.code for each in starts] == [2, 2], starts
    [line] = "".join(each.err for each in starts).splitlines()
    assert line.startswith("ConfigError: strategy=auto: nothing fits on 2 ranks. The least takes strategy=")
    assert "cluster.nodes=" in line or "cluster=" in line
    assert not (tmp_path / "run").exists()


def test_auto_whose_cluster_is_another_is_refused(workers: Workers, tmp_path: Path) -> None:
    answers = workers.run(fit, 2, str(tmp_path / "run"), [*TINY, "strategy=auto", "cluster=p4d", "precision=bf16"])
    for answer in answers:
        assert "the cluster has 1 x 8 devices, and there are 1 x 2 processes" in answer["message"]


def decided(overrides: list[str], memory: list[float]) -> list[str]:
    """What this rank would train with, where rank r has `memory[r]` bytes free."""
    from trainer.build import settled

    config = compose(overrides)
    mine = memory[int(os.environ["RANK"])]
    with mock.patch("trainer.choosing.host_memory", return_value=(mine, mine)):
        _, choices, choice = settled(config, {"strategy": "auto"})
    assert choice is not None
    assert choice.words[0] == f"strategy={choices['strategy']}"
    return [*choice.words, *(line for line in choice.lines if line.startswith("strategy"))]


def test_ranks_that_see_different_memory_choose_alike(workers: Workers, tmp_path: Path) -> None:
    words = [*TINY, f"cache={tmp_path}", "strategy=auto"]
    first, second = workers.run(decided, 2, words, [64.0 * GIB, 2.0 * GIB], local_size=1)
    *words_of_first, line = first
    assert words_of_first == second
    assert "of 2.00 GiB per rank" in line, "the smaller one counts"


def test_run_that_is_not_to_be_predicted_is_not(workers: Workers, tmp_path: Path) -> None:
    [answer] = workers.run(fit, 1, str(tmp_path / "run"), [*TINY, *SMALL, "trainer.predict=false"])
    assert "error" not in answer, answer
    assert "predicted" not in summary_of(tmp_path / "run")


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        found: Tensor = self.layer(input) * (1.0 + 0.0 * input.sum().item())
        return found


@dataclass(kw_only=True)
class Reader(Rows):
    """Its model can't run without values."""

    def make_model(self) -> nn.Module:
        return Reading()


def test_run_that_cannot_be_predicted_trains_all_the_same(workers: Workers, tmp_path: Path) -> None:
    [answer] = workers.run(fit, 1, str(tmp_path / "run"), [*ROWS, "strategy=ddp"], Reader)
    assert answer["progress"]["step"] == 10, answer
    assert "predicted" not in summary_of(tmp_path / "run")


@functools.lru_cache
def mask(size: int) -> Tensor:
    return torch.ones(size)


class Hoarding(nn.Module):
    """Keeps what it makes, as some models do with masks and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.kept: dict[int, Tensor] = {}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        size = input.shape[-1]
        if size not in self.kept:
            self.kept[size] = torch.ones(size)
        found: Tensor = self.layer(input * mask(size) * self.kept[size])
        return found


@dataclass(kw_only=True)
class Hoarder(Plain):
    """Its model would meet again what it kept while it was predicted."""

    def make_model(self) -> nn.Module:
        return Hoarding()


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_run_whose_model_keeps_tensors_meets_none_without_storage(
    workers: Workers, tmp_path: Path, strategy: str
) -> None:
    [answer] = workers.run(fit, 1, str(tmp_path / "run"), [*ROWS, f"strategy={strategy}"], Hoarder)
    assert answer["progress"]["step"] == 10, answer
    assert "predicted" in summary_of(tmp_path / "run")


def test_run_on_processors_predicts_memory_alone(workers: Workers, tmp_path: Path) -> None:
    workers.run(fit, 2, str(tmp_path / "run"), [*TINY, *SMALL, "strategy=fsdp_full"])
    said = summary_of(tmp_path / "run")
    assert said["predicted"]["step_s"] is None
    assert set(said["prediction_error_percent"]) == {"memory_bytes"}
    assert not (tmp_path / "run" / "prediction.json").exists()


# The choice itself.


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    config = compose([*TINY, "model.config.num_hidden_layers=4", "model.config.vocab_size=256"])
    model = made(config.model)
    model.prepare(None)
    return facts_of(model, 2.0, Precision(), length=64, device="cuda")


def wanted(facts: ModelFacts, strategies: Mapping[str, Strategy], **more: Any) -> Wanted:
    settings: dict[str, Any] = {"checkpointing": {"none": None}, "global_batch": 64, "micro_batch": None, **more}
    return Wanted(facts=facts, strategies=strategies, **settings)


def machines(memory_bytes: float, devices: int = 8, **more: Any) -> Machines:
    known = {"memory_gb_per_s": 3000.0, "link_gb_per_s": 400.0, "host_memory_gib": 1000.0, "host_link_gb_per_s": 50.0}
    cluster = Cluster(device="H100 80GB HBM3", devices=devices, memory_gib=memory_bytes / GIB, **{**known, **more})
    return replace(cluster.facts(Precision().numbers), memory_bytes=int(memory_bytes))


FACTORS = efficiency_of("H100 80GB HBM3", Precision().numbers)
THREE: dict[str, Strategy] = {
    "zero2": DeepSpeedStrategy(stage=2),
    "ddp": DDPStrategy(),
    "fsdp_full": FSDPStrategy(),
}


def test_choice_of_equally_fast_ones_needs_no_further_library(facts: ModelFacts) -> None:
    best, others, _ = choose(wanted(facts, THREE), machines(GIB, link_gb_per_s=1e5), FACTORS)
    assert best is not None
    assert best.strategy in ("ddp", "fsdp_full")
    assert {each.strategy for each in (best, *others)} == set(THREE)
    first, second = said(best, others, ["strategy=x"])
    assert first.startswith("strategy=auto: strategy=x: ")
    assert second.startswith(f"runner-up: strategy={others[0].strategy}: ")


def test_choice_recomputes_activations_only_where_nothing_fits_without(facts: ModelFacts) -> None:
    job = wanted(facts, {"ddp": DDPStrategy()}, global_batch=8 * 256, micro_batch=256)
    whole, *_ = choose(job, machines(GIB), FACTORS)
    assert whole is not None
    assert chosen_words(whole, job, own_checkpointing=False) == ["strategy=ddp"]
    tight, *_ = choose(job, machines(0.7 * whole.memory.total / 0.85), FACTORS)
    assert tight is not None
    assert tight.plan.activation_checkpointing is not None
    assert any(
        word.startswith("trainer.activation_checkpointing=")
        for word in chosen_words(tight, job, own_checkpointing=False)
    )
    as_said, *_ = choose(job, machines(0.7 * whole.memory.total / 0.85), FACTORS, own_checkpointing=True)
    assert as_said is None, "the user wants none"
    full = replace(job, checkpointing={"full": ActivationCheckpointing()})
    own, *_ = choose(full, machines(GIB), FACTORS, own_checkpointing=True)
    assert own is not None
    assert chosen_words(own, full, own_checkpointing=True) == ["strategy=ddp"]


def test_choice_with_an_optimizer_of_whole_parameters_cuts_none(facts: ModelFacts) -> None:
    best, others, _ = choose(wanted(facts, THREE), machines(GIB), FACTORS, elementwise=False)
    assert best is not None
    assert [best.strategy, *(each.strategy for each in others)] == ["ddp"]


def test_choice_is_on_nvme_only_if_it_was_named(facts: ModelFacts) -> None:
    config = compose([*TINY, "strategy=zero_infinity"])
    job = wanted(facts, {"zero_infinity": made(config.strategy)})
    there = machines(GIB, disk_gb=1000.0)
    assert choose(job, there, FACTORS)[0] is None
    assert choose(job, there, FACTORS, with_nvme=True)[0] is not None


def test_choice_without_rates_sends_least(facts: ModelFacts) -> None:
    job = wanted(facts, {"fsdp_full": FSDPStrategy(), "ddp": DDPStrategy()})
    best, others, _ = choose(job, replace(machines(GIB), link_bytes_per_s=None), FACTORS)
    assert best is not None
    assert best.speed is None
    assert (best.strategy, others[0].strategy) == ("ddp", "fsdp_full")
    assert "it sends least" in said(best, others, ["strategy=ddp"])[0]


def test_single_process_is_single(facts: ModelFacts) -> None:
    job = wanted(facts, {"ddp": DDPStrategy(), "single": SingleStrategy(), "fsdp_full": FSDPStrategy()})
    best, *_ = choose(job, machines(GIB, devices=1), FACTORS)
    assert best is not None
    assert best.strategy == "single"


def test_names_that_are_no_strategies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dpp' is not a strategy\. Nearest: ddp.*\(strategy\.among\)"):
        Auto(among=["dpp"]).chosen_from(THREE)
    assert Auto(among=["ddp"]).chosen_from(THREE) == ["ddp"]
    assert Auto().chosen_from(THREE) == list(THREE)


def seen(**changes: Any) -> Seen:
    values: dict[str, Any] = {"device": "cpu", "memory_bytes": 8.0 * GIB, "host_memory_bytes": 16.0 * GIB,
                              "disk_bytes": 1e12, "flops": 2e11, "copied_bytes_per_s": 1e10}  # fmt: skip
    return Seen(**{**values, **changes})


def test_machines_are_as_the_weakest_rank_sees_them() -> None:
    ranks = [seen(), seen(memory_bytes=3.0 * GIB, flops=1e11)]
    found = machines_of(None, ranks, size=2, local_size=1, link=None, numbers=Precision().numbers)
    assert (found.nodes, found.devices, found.memory_bytes, found.peak_flops) == (2, 1, 3 * GIB, 1e11)
    given = machines_of(
        Cluster(measure=True, memory_gib=1.5), ranks, size=2, local_size=2, link=1e9, numbers=Precision().numbers
    )
    assert (given.nodes, given.memory_bytes, given.link_bytes_per_s) == (1, 1.5 * GIB, 1e9)


def test_machines_of_a_known_instance_have_its_links() -> None:
    ranks = [seen(device="NVIDIA H100 80GB HBM3", flops=None, copied_bytes_per_s=None, memory_bytes=70.0 * GIB)] * 8
    found = machines_of(
        None, ranks, size=8, local_size=8, link=None, numbers=Precision().numbers, instance="p5.48xlarge"
    )
    assert (found.memory_bytes, found.link_bytes_per_s) == (70 * GIB, 450e9)
