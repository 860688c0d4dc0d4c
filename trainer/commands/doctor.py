"""What this machine has, and whether its ranks can talk; alone or under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from strategies.world import World

_SIZES = (2**10, 2**20, 2**24)


def parser() -> Parser:
    """`shardwright doctor`'s own options."""
    found = Parser(
        "doctor",
        "Show versions, devices, memory and disk, and measure an all-reduce between the ranks. "
        "For several processes: torchrun --standalone --nproc-per-node 2 scripts/doctor.py",
    )
    found.add_argument("--json", type=Path, metavar="FOLDER", help="write doctor.json there")
    return found


def main(options: Namespace) -> int:
    """Print a table, and write `doctor.json` where asked."""
    import torch.distributed as dist

    from strategies.backends import AutoBackend, connect_ranks

    world = connect_ranks(AutoBackend())
    try:
        found = examine(world)
        with world.together():
            if world.rank == 0:
                _show(found)
                _write(found, options.json)
    finally:
        dist.destroy_process_group()
    return 0


def _write(found: dict[str, Any], folder: Path | None) -> None:
    from strategies.errors import ConfigError

    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "doctor.json").write_text(json.dumps(found, indent=1))
    except OSError as error:
        raise ConfigError(f"doctor: {folder} can't be written: {error.strerror}. Choose another (--json).") from error


def examine(world: World) -> dict[str, Any]:
    """Everything that is shown, as JSON values; collective."""
    import psutil
    import torch

    from trainer.run_folder import describe_environment

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    return {
        **describe_environment(world),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "hosts": sorted({str(host) for host in world.gather(os.uname().nodename)}),
        "all_reduce": [_all_reduce(world, size) for size in _SIZES],
    }


def _all_reduce(world: World, size: int) -> dict[str, float]:
    """Median of nine, after two to warm up. Bus bandwidth as in NCCL's tests: 2 (n - 1) / n bytes per byte."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(size // 4, device=world.device)
    times = []
    for turn in range(11):
        world.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if turn >= 2:
            times.append(time.perf_counter() - begin)
    took = statistics.median(times)
    return {"bytes": size, "ms": 1e3 * took, "bus_gb_per_s": 2 * (world.size - 1) / world.size * size / took / 1e9}


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="This machine", show_header=False)
    for key, value in found.items():
        if key in ("packages", "all_reduce", "command"):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", " "), text or "none")
    for name, version in found["packages"].items():
        table.add_row(name, version)
    for line in found["all_reduce"]:
        table.add_row(f"all-reduce {line['bytes']:,} bytes", f"{line['ms']:.3f} ms, {line['bus_gb_per_s']:.2f} GB/s")
    Console().print(table)
