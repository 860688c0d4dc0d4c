"""One of two processes that measure an all-reduce over Gloo: `python -m trainer.planner.gloo STORE RANK`."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_BYTES = 1 << 25
_TURNS = 5


def main(store: str, rank: int) -> None:
    """Rank 0 writes the bytes per second that each sends: with two ranks, as many as the tensor has."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    tensor = torch.ones(_BYTES // 4)
    dist.all_reduce(tensor)
    best = float("inf")
    for _ in range(_TURNS):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        best = min(best, time.perf_counter() - begun)
    dist.destroy_process_group()
    if rank == 0:
        sys.stdout.write(f"{_BYTES / best}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
