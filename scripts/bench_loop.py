"""The loop that somebody writes by hand for one job, and tunes: what `scripts/bench.py` holds ours against.

Uses nothing of this project. Same job: a Llama of `transformers`, byte tokens from a file, AdamW without decay
for norms, gradients clipped, a cosine rate, a line of metrics every `log_every` steps.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that isn't installed

from scripts.bench_engines import by_deepspeed, by_horovod, by_torch, ranks


def main(job: dict[str, Any]) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    rank, local_rank, world_size = ranks()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    folder, spread, length, size = Path(job["folder"]), job["spread"], job["length"], job["batch"]
    engines = {"zero": by_deepspeed, "rings": by_horovod}
    if spread not in ("alone", "rings"):  # Horovod connects by itself
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size == 1 else {}
        dist.init_process_group("nccl" if cuda else "gloo", **alone)
    torch.manual_seed(0)
    core = LlamaForCausalLM(LlamaConfig(**job["model"], use_cache=False, tie_word_embeddings=False)).to(device)
    model, cast = core.train(), job["precision"] == "bf16"
    if spread == "sharded":
        shard(core, job["groups"], device, cast, job["compile"])
        cast = False  # it's done where layers are gathered
    elif job["compile"]:
        core.compile()
    if spread == "replicated":
        model = replicate(core, device)
    parameters = list(core.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    num_parameters = sum(p.numel() for p in parameters)
    if spread in engines:
        engine = engines[spread](core, optimizer, job)
        model, optimizer, cast = engine.model, engine.optimizer, cast and spread != "zero"
    else:
        engine = by_torch(model, core, optimizer, parameters)

    tokens = np.load(job["tokens"], mmap_mode="r")
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // length)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = order[((step * world_size + rank) * size + np.arange(size)) % len(order)] * length
        rows = torch.from_numpy(np.stack([tokens[at : at + length + 1] for at in starts]).astype(np.int64))
        if cuda:
            rows = rows.pin_memory().to(device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:].flatten()

    marks, first_step_at = list[tuple[int, float, float]](), 0.0
    with (folder / f"loop-{rank}.jsonl").open("w") as log:
        for step in range(job["steps"]):
            rate = job["lr"] * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (job["steps"] - 1))))
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, labels = batch(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=cast):
                logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels)
            norm = engine.update(loss)
            done = step + 1
            if done % job["log_every"] == 0 or done in (1, job["steps"]):
                line = {
                    "step": done,
                    "loss": loss.item(),
                    "grad_norm": float(getattr(norm, "full_tensor", lambda norm=norm: norm)()),
                    "lr": rate,
                }
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
        "num_parameters": num_parameters,
        "saves_s": [engine.save(folder / f"checkpoint-{number}") for number in range(job["saves"])],
    }
    (folder / f"clocks-{rank}.json").write_text(json.dumps(record))
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # everything is measured; to take DDP and its group down in order hangs now and then in torch 2.13


def replicate(model: Any, device: Any) -> Any:
    """With one copy on each rank."""
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {  # torch 2.13 renamed the second, and warns about the old name
        "device_ids": [device] if device.type == "cuda" else None,
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False,
    }
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True, **options)


def shard(model: Any, groups: int, device: Any, bf16: bool, compiled: bool) -> None:
    """Cut a model by layer over the ranks of each of `groups` groups."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape = (groups, dist.get_world_size() // groups)[0 if groups > 1 else 1 :]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    numbers = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.model.layers:
        if compiled:
            layer.forward = torch.compile(layer.forward)
        fully_shard(layer, mesh=mesh, mp_policy=numbers)
    fully_shard(model, mesh=mesh, mp_policy=numbers, reshard_after_forward=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
