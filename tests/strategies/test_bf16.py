"""bf16 means the same under every strategy: as close as two splits of a batch under one of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from strategies._torch import TorchStrategy, part
from strategies.testing import Workers
from tests.trainer.jobs import TINY, fit, losses

STEPS = 50
RUNS = {
    "ddp": ["strategy=ddp"],
    "ddp in two micro-batches": ["strategy=ddp", "trainer.micro_batch=2"],
    "fsdp_full": ["strategy=fsdp_full"],
    "fsdp_hybrid": ["strategy=fsdp_hybrid", "strategy.shard_size=2"],
}


def fit_watched(folder: str, words: list[str]) -> tuple[dict[str, Any], set[torch.dtype]]:
    """A run, and the types of its live weights, gradients and moments in the last step."""
    found: set[torch.dtype] = set()
    step = TorchStrategy.step

    def watched(self: TorchStrategy, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        trained = [value for group in optimizer.param_groups for value in group["params"]]
        found.update(part(value.grad).dtype for value in trained)
        result = step(self, model, optimizer)
        moments = [slot for value in trained for slot in optimizer.state[value].values()]
        found.update(part(value).dtype for value in (*model.parameters(), *moments))
        return result

    with mock.patch.object(TorchStrategy, "step", watched):
        return fit(folder, words), found


def test_strategies_stay_as_close_as_two_splits_do(workers: Workers, tmp_path: Path) -> None:
    words = [*TINY, "precision=bf16", "trainer.global_batch=16", f"trainer.max_steps={STEPS}", "optimizer.lr=3e-3"]
    curves = {}
    for name, how in RUNS.items():
        folder = tmp_path / name
        for outcome, dtypes in workers.run(fit_watched, 4, str(folder), [*words, "trainer.micro_batch=4", *how]):
            assert outcome["progress"]["step"] == STEPS
            assert dtypes == {torch.float32}
        curves[name] = losses(folder)
        assert len(curves[name]) == STEPS
        assert curves[name][-1] < curves[name][0] - 1  # it learns

    def gap(one: str, other: str) -> float:
        return statistics.fmean(abs(x - y) for x, y in zip(curves[one], curves[other], strict=True))

    splits = gap("ddp", "ddp in two micro-batches")
    assert splits > 0
    for one, other in (("ddp", "fsdp_full"), ("ddp", "fsdp_hybrid"), ("fsdp_full", "fsdp_hybrid")):
        assert gap(one, other) <= 2 * splits, f"{one}, {other}: {gap(one, other):.1e}, two splits: {splits:.1e}"
