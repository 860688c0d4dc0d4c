"""The loop that somebody writes by hand for one job, and tunes: what `scripts/bench.py` holds ours against.

Uses nothing of this project. Same job: a Llama of `transformers`, byte tokens from a file, AdamW without decay
for norms, gradients clipped, a cosine rate, a line of metrics every `log_every` steps.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(job["folder"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    length = job["length"]
    core = LlamaForCausalLM(LlamaConfig(**job["model"], use_cache=False, tie_word_embeddings=False)).to(device)
    model: torch.nn.Module = core.train()
    if world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            core,
            device_ids=[device] if cuda else None,
            gradient_as_bucket_view=True,
            static_graph=True,
            **buffers_stay(),
        )
    parameters = list(core.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)

    tokens = np.load(job["tokens"], mmap_mode="r")
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // length)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = int(order[(step * world_size + rank) % len(order)]) * length
        row = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        if cuda:
            row = row.pin_memory().to(device, non_blocking=True)
        return row[None, :-1], row[1:]

    marks: list[tuple[int, float, float]] = []
    first_step_at = 0.0
    with (folder / f"loop-{rank}.jsonl").open("w") as log:
        for step in range(job["steps"]):
            rate = job["lr"] * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (job["steps"] - 1))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, labels = batch(step)
            loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % job["log_every"] == 0 or done in (1, job["steps"]):
                line = {"step": done, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
                log.write(json.dumps(line) + "\n")
                log.flush()
                marks.append((done, time.perf_counter(), time.process_time()))
                first_step_at = first_step_at or time.time()
    record = {
        "marks": marks,
        "first_step_at": first_step_at,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": loss.item(),
        "num_parameters": sum(p.numel() for p in parameters),
        "saves_s": [save(core, optimizer, folder / f"checkpoint-{number}") for number in range(job["saves"])],
    }
    (folder / f"clocks-{rank}.json").write_text(json.dumps(record))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # everything is measured; to take DDP and its group down in order hangs now and then in torch 2.13


def buffers_stay() -> dict[str, Any]:
    """Don't send buffers around; torch 2.13 renamed the argument, and warns about the old name."""
    import inspect

    import torch

    known = inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def save(model: Any, optimizer: Any, folder: Path) -> float:
    """A plain synchronous save of everything that a resume needs; its seconds, on the slowest rank."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
