"""`shardwright plan` as people meet it: what it refuses, in one line and before anything is written, and its tables."""

# ruff: noqa: E501 - the cases are a table

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.cli import main
from trainer.models.hf import HFModel

TINY = "data.length=16 model.config.num_hidden_layers=2 model.config.hidden_size=32 model.config.intermediate_size=64"


@dataclass(frozen=True)
class Bad:
    """Words that must be refused; `{files}` is a folder with files, `{run}` one that must not come to be."""

    words: str
    says: tuple[str, ...]
    make: Callable[[HFModel], nn.Module] | None = None
    """In place of the model's own."""


def bad(words: str, *says: str, make: Callable[[HFModel], nn.Module] | None = None) -> Bad:
    return Bad(words, says, make)


class Reads(nn.Module):
    """Its forward hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        scale = 1.0 if self.weight.sum().item() > 0 else 2.0
        return self.weight[input_ids % 8] * scale


def _reads_while_made(model: HFModel) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight.data *= float(module.weight.data.abs().max())
    return module


MACHINES = {
    "instance_unknown": bad("cluster=custom cluster.instance=p5.24xlarge", "'p5.24xlarge'", "p5.4xlarge", "cluster=custom", "(cluster.instance)"),
    "cluster_unknown": bad("cluster=p6", "cluster=p6", "p6_b200"),
    "cluster_key_unknown": bad("cluster=p5 cluster.node=2", "cluster.node", "Nearest: nodes"),
    "cluster_of_your_own_without_numbers": bad("cluster=custom", "how many devices", "(cluster.devices, cluster.instance)"),
    "cluster_of_your_own_without_memory": bad("cluster=custom cluster.devices=8", "memory", "(cluster.memory_gib)"),
    "cluster_of_your_own_without_peak": bad("cluster=custom cluster.devices=8 cluster.memory_gib=80", "peak", "(cluster.peak_tflops)"),
    "nodes_none": bad("cluster=p5 cluster.nodes=0", "nodes=0", "above 0", "(cluster.nodes)"),
    "nodes_below_none": bad("cluster=p5 cluster.nodes=-1", "nodes=-1", "above 0", "(cluster.nodes)"),
    "nodes_absurd": bad("cluster=p5 cluster.nodes=1000000000", "nodes=1000000000", "(cluster.nodes)"),
    "nodes_absurd_to_compare": bad("cluster=p5 --nodes 1,1000000", "nodes=1000000", "(cluster.nodes)"),
    "nodes_of_none_to_compare": bad("cluster=p5 --nodes 0", "--nodes", "'0'"),
    "nodes_with_a_gap": bad("cluster=p5 --nodes 1,,2", "--nodes", "''"),
    "nodes_said_twice": bad("cluster=p5 cluster.nodes=2 --nodes 4", "--nodes", "(cluster.nodes)"),
    "nodes_without_a_cluster": bad("--nodes 2", "--nodes", "cluster=p5"),
    "ranks_beside_a_cluster": bad("cluster=p5 --ranks 8", "--ranks=8", "(cluster)"),
    "devices_more_than_there_are": bad("cluster=p5 cluster.devices=16", "devices=16", "8"),
    "price_below_nothing": bad("cluster=p5 cluster.price=-1", "price=-1", "(cluster.price)"),
    "precision_that_the_device_lacks": bad("cluster=p3dn precision=bf16", "bf16", "V100", "precision=fp32"),
}  # fmt: skip

BUDGETS = {
    "tokens_none": bad("cluster=p5 --tokens 0", "--tokens", "'0'"),
    "tokens_below_none": bad("cluster=p5 --tokens -1", "--tokens", "'-1'"),
    "tokens_not_a_number": bad("cluster=p5 --tokens nan", "--tokens", "'nan'"),
    "tokens_without_end": bad("cluster=p5 --tokens inf", "--tokens", "'inf'"),
    "tokens_a_word": bad("cluster=p5 --tokens abc", "--tokens", "'abc'"),
    "tokens_without_a_cluster": bad("--tokens 1e9", "--tokens", "cluster=p5"),
    "overhead_of_everything": bad("cluster=p5 --tokens 1e9 --overhead 1", "--overhead", "'1'"),
    "overhead_below_nothing": bad("cluster=p5 --tokens 1e9 --overhead -0.1", "--overhead", "'-0.1'"),
    "overhead_of_nothing_to_train": bad("cluster=p5 --overhead 0.1", "--overhead", "(--tokens)"),
    "warm_up_below_nothing": bad("cluster=p5 --tokens 1e9 --warm-up -5", "--warm-up", "'-5'"),
    "starts_that_cost_nothing": bad("cluster=p5 --tokens 1e9 --starts 3", "--starts", "(--warm-up)"),
    "spot_of_the_whole_price": bad("cluster=p5 --spot 1", "--spot", "'1'"),
    "spot_without_a_price": bad("cluster=p5e --spot 0.4", "--spot", "no price", "(cluster.price)"),
    "top_of_none": bad("cluster=p5 --top 0", "--top", "'0'"),
    "sensitivity_without_a_cluster": bad("--sensitivity", "--sensitivity", "cluster=p5"),
}  # fmt: skip

JOBS = {
    "key_unknown": bad("cluster=p5 optimizer.lrate=1", "optimizer.lrate", "lr, weight_decay"),
    "option_unknown": bad("cluster=p5 --node 2", "--node", "--help"),
    "strategy_unknown": bad("cluster=p5 strategy=fsdp", "strategy=fsdp", "fsdp_full"),
    "strategy_of_one_process": bad("cluster=p5 strategy=single", "strategy=single", "8 processes"),
    "group_that_does_not_divide": bad("cluster=p5 strategy=fsdp_hybrid strategy.shard_size=3", "shard_size=3", "8", "(strategy.shard_size)"),
    "replicas_that_do_not_divide": bad("cluster=p5 strategy=fsdp_hybrid strategy.replicas=5", "replicas=5", "8", "(strategy.replicas)"),
    "group_of_hpz_that_does_not_divide": bad("cluster=p5 strategy=zero_hpz strategy.hpz_size=3", "hpz_size=3", "8", "(strategy.hpz_size)"),
    "group_where_there_is_none": bad("cluster=p5 strategy=fsdp_full strategy.shard_size=4", "shard_size=4", "fsdp_hybrid"),
    "one_device_in_groups": bad("cluster=p5 cluster.devices=1 strategy=fsdp_hybrid", "fsdp_hybrid", "1", "(strategy, cluster.nodes)"),
    "batch_that_cannot_be_dealt_out": bad("cluster=p5 trainer.global_batch=12", "global_batch=12", "8", "(trainer.global_batch)"),
    "batch_smaller_than_the_ranks": bad("--ranks 8 trainer.global_batch=4", "global_batch=4", "8", "(trainer.global_batch)"),
    "micro_batch_that_does_not_divide": bad("cluster=p5 trainer.global_batch=32 trainer.micro_batch=3", "micro_batch=3", "4", "(trainer.micro_batch)"),
    "micro_batch_of_none": bad("cluster=p5 trainer.micro_batch=0", "micro_batch=0", "(trainer.micro_batch)"),
    "precision_that_the_strategy_lacks": bad("--ranks 2 strategy=zero1 precision=fp64", "fp32 at most", "(precision)"),
    "compiling_what_cannot_be": bad("cluster=p5 strategy=zero3 compile=true", "torch.compile", "(compile, strategy)"),
    "optimizer_of_whole_matrices_cut": bad("cluster=p5 strategy=zero2 optimizer=adafactor", "whole matrices", "(optimizer, strategy)"),
    "samples_longer_than_the_model_knows": bad("cluster=p5 data.length=4096", "4096", "2048 positions", "(data.length"),
    "model_of_a_trainer": bad("cluster=p5 model=own", "model=own", "strategy=auto"),
    "model_nowhere": bad("cluster=p5 model=hf model.path={files}/nothing", "nothing", "(model.path)"),
    "model_that_reads_while_it_is_made": bad("cluster=p5", "without storage", "(model)", make=_reads_while_made),
    "model_that_reads_while_it_runs": bad("cluster=p5", "Reads", "without storage", ".item()", make=lambda model: Reads()),
    "folder_that_is_a_file": bad("cluster=p5 run.dir={files}/file", "file", "(run.dir)"),
    "folder_in_a_file": bad("cluster=p5 run.dir={files}/file/runs/a", "is a file", "(run.dir)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MACHINES, *BUDGETS, *JOBS])
def test_plan_of_wrong_input_is_one_line_and_writes_nothing(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {**MACHINES, **BUDGETS, **JOBS}[name]
    files = tmp_path / "files"
    files.mkdir()
    (files / "file").write_text("")
    if case.make is not None:
        monkeypatch.setattr(HFModel, "make", case.make)
    words = case.words.format(files=files).split()
    if "run.dir" not in case.words:
        words.append(f"run.dir={tmp_path / 'plan'}")
    if not any(word.startswith(("model=", "--top", "data.length")) for word in words):
        words += TINY.split()
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("ConfigError: ")
    assert not [part for part in case.says if part not in err], err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "files"]
