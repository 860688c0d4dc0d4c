"""Plain loops of DeepSpeed and Accelerate that write real checkpoints, in one launch of two processes.

    torchrun --nproc-per-node 2 -m tests.trainer.imports.others FOLDER zero1 ddp ...

Each case trains `job.Model` for a few steps of AdamW, saves as that system saves, and goes on: its losses are what a
run that comes over must have. `told.json` of a case holds them; `told.pt` masters and moments, as the system itself
tells them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from tests.trainer.imports.job import AFTER, BEFORE, BETAS, EPS, GLOBAL_BATCH, LR, groups_of, model, rows_of

Told = dict[str, Any]


def trained(forward: nn.Module, steps: range, step: Callable[[torch.Tensor], None]) -> list[float]:
    """Train on this rank's share; the mean loss of each step over all ranks."""
    losses = []
    for index in steps:
        rows = rows_of(index).chunk(dist.get_world_size())[dist.get_rank()]
        logits = forward(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        step(loss)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def optimizer_of(module: nn.Module, *, named: bool = False) -> AdamW:
    """AdamW in two groups, or in one of all parameters with their names, frozen ones among them."""
    parameters = list(module.named_parameters()) if named else groups_of(module)
    return AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def with_deepspeed(folder: Path, stage: int, numbers: str = "fp32", tag: str | None = None, **more: Any) -> Told:
    """A plain engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    module = model()
    settings = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        **({} if numbers == "fp32" else {numbers: {"enabled": True, **more.pop("precision", {})}}),
        **more,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer_of(module), config=settings)

    def step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    trained(engine, range(BEFORE), step)
    engine.save_checkpoint(str(folder), tag=tag, client_state={"mine": argparse.Namespace(epoch=1)})
    told: Told = {"tensors": {}, "scaler": getattr(engine.optimizer, "cur_scale", None)}
    if numbers != "fp32" and not stage:  # what the losses of fp32 can't show
        names = {id(value): name for name, value in module.named_parameters()}
        for halves, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                name, state = names[id(half)], engine.optimizer.optimizer.state[master]
                told["tensors"][f"weights/{name}"] = master.detach().clone()
                told["tensors"] |= {
                    f"optim/{name}/{slot}": state[slot].clone() for slot in ("exp_avg", "exp_avg_sq", "step")
                }
    if numbers != "fp32" and stage:
        if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # with two groups, one rank would wait for ever
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, value in module.named_parameters():
            if value.requires_grad:
                told["tensors"][f"weights/{name}"] = safe_get_full_fp32_param(value)
                for slot in ("exp_avg", "exp_avg_sq"):
                    told["tensors"][f"optim/{name}/{slot}"] = safe_get_full_optimizer_state(value, slot)
    told["losses"] = trained(engine, range(BEFORE, BEFORE + AFTER), step)
    engine.destroy()
    return told


def with_accelerate(folder: Path, *, safe: bool, named: bool = False) -> Told:
    """DDP, as Accelerate wraps it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module = model()
    wrapped, prepared = accelerator.prepare(module, optimizer_of(module, named=named))

    def step(loss: torch.Tensor) -> None:
        accelerator.backward(loss)
        prepared.step()
        prepared.zero_grad()

    trained(wrapped, range(BEFORE), step)
    accelerator.save_state(str(folder), safe_serialization=safe)
    return {"losses": trained(wrapped, range(BEFORE, BEFORE + AFTER), step)}


def with_fsdp(folder: Path, *, full: bool, version: int = 2) -> Told:
    """FSDP by hand, since Accelerate has it only on accelerators; written by Accelerate's own functions."""
    from accelerate import Accelerator
    from accelerate.checkpointing import save_accelerator_state
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
        StateDictType,
        fully_shard,
    )

    Accelerator(cpu=True)
    module: Any = model()
    if version == 1:
        module = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(module.layers[0])
        fully_shard(module)
    optimizer = optimizer_of(module)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained(module, range(BEFORE), step)
    kind = StateDictType.FULL_STATE_DICT if full else StateDictType.SHARDED_STATE_DICT
    weights: Any = SimpleNamespace(offload_to_cpu=full, rank0_only=full)
    moments = None
    if version == 1:
        weights, moments = ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    plugin = SimpleNamespace(
        fsdp_version=version, state_dict_type=kind, state_dict_config=weights, optim_state_dict_config=moments
    )
    accelerator = SimpleNamespace(num_processes=2, process_index=dist.get_rank(), is_fsdp2=True)
    save_fsdp_model(plugin, accelerator, module, str(folder))
    save_fsdp_optimizer(plugin, accelerator, optimizer, module, str(folder))
    save_accelerator_state(str(folder), [], [], [], [], dist.get_rank(), step=0)
    return {"losses": trained(module, range(BEFORE, BEFORE + AFTER), step)}


CASES: dict[str, Callable[[Path], Told]] = {
    "zero0": lambda folder: with_deepspeed(folder, 0),
    "zero1": lambda folder: with_deepspeed(folder, 1),
    "zero2": lambda folder: with_deepspeed(folder, 2, zero={"round_robin_gradients": True}),
    "zero3": lambda folder: with_deepspeed(folder, 3, tag="pytorch_model", zero={"sub_group_size": 60}),
    "zero0_bf16": lambda folder: with_deepspeed(folder, 0, "bf16"),
    "zero1_bf16": lambda folder: with_deepspeed(folder, 1, "bf16", data_types={"grad_accum_dtype": "fp32"}),
    "zero2_fp16": lambda folder: with_deepspeed(
        folder, 2, "fp16", precision={"initial_scale_power": 8, "loss_scale_window": 2}
    ),
    "zero3_bf16": lambda folder: with_deepspeed(folder, 3, "bf16"),
    "ddp": lambda folder: with_accelerate(folder, safe=True),
    "ddp_bin": lambda folder: with_accelerate(folder, safe=False, named=True),
    "fsdp": lambda folder: with_fsdp(folder, full=False),
    "fsdp1": lambda folder: with_fsdp(folder, full=False, version=1),
    "fsdp_full": lambda folder: with_fsdp(folder, full=True),
}


def _connect_deepspeed() -> None:
    import deepspeed

    # Its operator for reductions in shared memory takes up to two minutes to compile, and Gloo does the same. By its
    # module's name, since `deepspeed.comm.torch` is torch.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.get_accelerator().is_fp16_supported = lambda: True  # it asks for AMX, and torch computes it anyway
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def main(folder: Path, names: list[str]) -> None:
    """Write each case into a folder of its own."""
    if any(name.startswith("zero") for name in names):
        _connect_deepspeed()
    else:
        dist.init_process_group("gloo")
    for name in names:
        begin = time.perf_counter()
        told = CASES[name](folder / name)
        tensors = told.pop("tensors", {})
        if dist.get_rank() == 0:
            torch.save(tensors, folder / name / "told.pt")
            (folder / name / "told.json").write_text(json.dumps(told))
            print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(Path(sys.argv[1]), sys.argv[2:])
