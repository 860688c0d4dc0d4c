"""Steps and saves by torch, DeepSpeed and Horovod, as their documentation shows them: for `scripts/bench_loop.py`.

Uses nothing of this project.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BUCKET = 25 << 20  # numbers


@dataclass(kw_only=True)
class Engine:
    """What the loop trains with."""

    model: Any
    optimizer: Any
    """Whose groups hold the rates."""
    update: Callable[[Any], Any]
    """From the loss: gradients, clipped to norm 1, a step; returns the norm."""
    save: Callable[[Path], float]
    """A checkpoint with all that a resume needs; its seconds, on the slowest rank."""


def ranks() -> tuple[int, int, int]:
    """Rank, local rank and number of ranks, whatever started them."""
    names = (("RANK", "HOROVOD_RANK"), ("LOCAL_RANK", "HOROVOD_LOCAL_RANK"), ("WORLD_SIZE", "HOROVOD_SIZE"))
    rank, local_rank, size = (
        next((int(os.environ[name]) for name in pair if name in os.environ), default)
        for pair, default in zip(names, (0, 0, 1), strict=True)
    )
    return rank, local_rank, size


def by_torch(model: Any, core: Any, optimizer: Any, parameters: list[Any]) -> Engine:
    """A step and a plain synchronous save by torch alone."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    def update(loss: Any) -> Any:
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def save(folder: Path) -> float:
        if dist.is_initialized():
            dist.barrier()
        begin = time.perf_counter()
        dcp.save({"model": core.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter() - begin

    return Engine(model=model, optimizer=optimizer, update=update, save=save)


def by_deepspeed(model: Any, optimizer: Any, job: dict[str, Any]) -> Engine:
    """ZeRO, stage `job["stage"]`, with the process group that is there."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start-up, used by inference alone
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": job["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": job["precision"] == "bf16"},
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": job["stage"],
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "stage3_prefetch_bucket_size": _BUCKET,
        },
    }
    engine, wrapped, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )

    def update(loss: Any) -> Any:
        engine.backward(loss)
        engine.step()
        return engine.get_global_grad_norm()

    def save(folder: Path) -> float:
        begin = time.perf_counter()
        engine.save_checkpoint(str(folder))  # ends with a barrier
        return time.perf_counter() - begin

    return Engine(model=engine, optimizer=wrapped, update=update, save=save)


def by_horovod(model: Any, optimizer: Any, job: dict[str, Any]) -> Engine:
    """Gradients all-reduced while backward runs."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    reduced = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    parameters = list(model.parameters())

    def update(loss: Any) -> Any:
        loss.backward()
        reduced.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        with reduced.skip_synchronize():
            reduced.step()
        reduced.zero_grad()
        return norm

    def save(folder: Path) -> float:
        hvd.barrier()
        begin = time.perf_counter()
        if hvd.rank() == 0:
            folder.mkdir()
            torch.save({"model": model.state_dict(), "optimizer": reduced.state_dict()}, folder / "all.pt")
        hvd.barrier()
        return time.perf_counter() - begin

    return Engine(model=model, optimizer=reduced, update=update, save=save)
