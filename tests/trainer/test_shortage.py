"""Memory that runs out on one rank, by the allocator's own word: all ranks end, and hear what to do."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from strategies.base import Batch, LossTerms, ModelSpec, Plan
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.single import SingleStrategy
from strategies.testing import Workers
from strategies.world import World
from tests.starts import TRAINERS, Start, start
from tests.trainer.jobs import ROWS, Rows, lines
from trainer.build import _others
from trainer.config import register_schemas, strategy_names
from trainer.shortage import Others, OutOfMemoryError, advice, is_shortage, out_of_memory

ROOM = 64 << 20
STEP = 4
"""Of the long samples; one sample is looked at before the first step."""


class Stack(nn.Module):
    def __init__(self, *, limited: bool) -> None:
        super().__init__()
        self.limited = limited
        self.layers = nn.ModuleList([nn.Linear(4, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 1)])

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs["input"]
        if self.limited and len(hidden) > 6:
            allow_little()
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        return hidden


@dataclass(kw_only=True)
class Greedy(Rows):
    """Meets long samples in one step, on one rank that has no memory for them."""

    fails_in: str = "nothing"
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._collated = 0

    def make_model(self) -> nn.Module:
        return Stack(limited=self.fails_in == "forward")

    def collate(self, samples: list[Any], seeds: list[int]) -> Batch:
        self._collated += 1
        batch = super().collate(samples, seeds)
        if self.fails_in == "nothing" or self._collated != STEP + 1 or int(os.environ["RANK"]) != self.rank:
            return batch
        return batch.map(lambda tensor: tensor.repeat(10_000, *[1] * (tensor.ndim - 1)))

    def loss(self, outputs: Any, batch: Batch) -> LossTerms:
        if len(batch.labels) > 6 and self.fails_in == "backward":
            allow_little()
        return super().loss(outputs, batch)


def allow_little() -> None:
    """From now on the kernel gives this process little more than it has."""
    limit = psutil.Process().memory_info().vms + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limited_start(words: list[str]) -> Start:
    before = resource.getrlimit(resource.RLIMIT_AS)
    TRAINERS["Greedy"] = Greedy
    try:
        return start(words, (), "Greedy")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("strategy", "part"), [("ddp", "forward"), ("fsdp_full", "backward")])
def test_rank_out_of_memory_ends_all_with_advice_and_the_next_start_goes_on(
    workers: Workers, tmp_path: Path, strategy: str, part: str
) -> None:
    words = [*ROWS, f"strategy={strategy}", f"run.dir={tmp_path}/run", "trainer.micro_batch=6", "trainer.max_steps=6",
             "checkpoint.every=2"]  # fmt: skip
    first, second = workers.outcomes(limited_start, 2, [*words, f"trainer.fails_in={part}"], timeout=60)
    # Rank 0 hears of it when the other's connections close, or is ended where it waits: here the other lives on.
    assert first.value.code == 1 if first.error is None else (first.error, first.message) == ("Died", "exit code 1")
    assert second.value.code == 1
    said = second.value.err + (first.printed if first.value is None else first.value.err)
    [line] = said.splitlines()
    asked = re.match(
        rf"TrainingError: rank 1: out of memory in the {part} pass of step 4: ([\d.]+) MiB asked for", line
    )
    assert asked is not None, line
    assert float(asked[1]) * 2**20 == pytest.approx(60_000 * 512 * 4, rel=0.01)
    assert ("strategy=fsdp_full saves" in line) == (strategy == "ddp"), line
    assert "optimizer=sgd saves" in line
    assert "trainer.micro_batch=3 instead of 6" in line
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    again = workers.run(limited_start, 2, words, timeout=60)
    assert [(each.code, each.err) for each in again] == [(0, "")] * 2
    assert "going on from" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert [entry["step"] for entry in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def shortage_of(error: Exception, **more: Any) -> OutOfMemoryError:
    assert is_shortage(error)
    return out_of_memory(error, **more)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), ": 2.50 GiB asked for"),
        (MemoryError("Unable to allocate 1.2 MiB for an array with shape (3,)"), ": 1.2 MiB asked for"),
        (RuntimeError("can't allocate memory: you tried to allocate 1536 bytes."), ": 1.5 KiB asked for"),
        (MemoryError(), ""),
        (OSError(12, "Cannot allocate memory"), ""),
    ],
)  # fmt: skip
def test_shortage_is_told_by_each_librarys_word(error: Exception, words: str) -> None:
    assert str(shortage_of(error)) == f"out of memory{words}"


def test_other_errors_are_no_shortage() -> None:
    assert not is_shortage(RuntimeError("shapes don't match"))
    assert not is_shortage(ValueError("out of memory"))


SPEC = ModelSpec(num_parameters=2**20, num_trainable=2**20, activation_bytes_per_sample=2**20)


def advised(device: str, spec: ModelSpec | None = SPEC, micro_batch: int = 4) -> str:
    plan = Plan(micro_batch=micro_batch, accumulation=3)
    shortage = OutOfMemoryError("out of memory", spec, plan)
    world = World(size=4, local_size=4, data_size=4, device=torch.device(device), store=dist.HashStore())
    strategies = {"single": SingleStrategy(), "grad_op": FSDPStrategy(sharding=Sharding.grad_op)}
    return advice(shortage, FSDPStrategy(), world, Others(strategies=strategies, slots={"sgd": 0.0, "adamw": 2.0}))


def test_advice_names_what_saves_and_how_much() -> None:
    text = advised("cuda")
    assert text.startswith("Of 16.0 MiB predicted per rank, ")  # 4 for the model's state, 8 at once, 4 of activations
    assert "strategy.cpu_offload=true saves 4.0 MiB" in text
    assert "optimizer=sgd saves 2.0 MiB" in text
    assert "trainer.micro_batch=3 saves 1.0 MiB" in text
    assert "trainer.activation_checkpointing=full keeps" in text
    assert "grad_op" not in text, "it saves nothing"
    assert "single" not in text, "it can't run on four ranks"
    assert "adamw" not in text, "it is what is used"


def test_advice_on_a_cpu_offloads_to_nowhere() -> None:
    assert "cpu_offload" not in advised("cpu")


def test_advice_without_known_activations_says_so() -> None:
    text = advised("cpu", ModelSpec(num_parameters=2**20, num_trainable=2**20))
    assert "besides activations" in text
    assert "trainer.micro_batch=3 instead of 4 saves activations in proportion" in text


def test_advice_before_the_model_is_known_names_keys() -> None:
    assert advised("cpu", None).endswith("(model, strategy).")


def test_every_choice_can_be_asked() -> None:
    register_schemas()
    found = _others()
    assert found.strategies.keys() >= set(strategy_names())  # other tests have registered more
    assert found.slots["adamw"] == 2.0
