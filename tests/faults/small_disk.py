"""`python -m tests.faults.small_disk FOLDER`: save into a folder until its disk is full; says in JSON what was left."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from strategies.errors import TrainingError
from strategies.world import World
from trainer.checkpoint import Checkpointer, Checkpoints, Record


def main(folder: str) -> None:
    """Fill it."""
    world = World(device=torch.device("cpu"), store=dist.HashStore())
    keeper = Checkpointer(f"{folder}/checkpoints", world, Checkpoints(keep=0))
    saved, problem = 0, ""
    while not problem and saved < 100:
        try:
            keeper.save({"weights/a": torch.zeros(4096)}, {}, Record(progress={"step": saved + 1}, world_size=1))
            saved += 1
        except TrainingError as error:
            problem = str(error)
    found = keeper.newest()
    print(json.dumps({"saved": saved, "error": problem, "newest": found and found.manifest.step}))


if __name__ == "__main__":
    main(sys.argv[1])
