"""One process as rank 0 of many that aren't there: torch's fake process group, which says that all has arrived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from strategies.backends import Backend
from strategies.errors import ConfigError
from strategies.world import Launch, World


@dataclass(kw_only=True)
class SimulatedBackend(Backend):
    """The ranks of a run without the run: what a step sends can be counted, and its numbers mean nothing.

    Gloo's groups for control and checkpoints would need the other ranks, so there are none.
    """

    size: int
    local_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_size <= self.size:
            raise ConfigError(
                f"SimulatedBackend: {self.local_size} ranks on a machine of {self.size} in all. "
                "Give numbers above 0, the second not below the first."
            )

    def launch(self) -> Launch:
        return Launch(size=self.size, local_size=self.local_size, on_one_machine=self.local_size == self.size)

    def torch_name(self) -> str:
        return "fake"

    def device(self, launch: Launch) -> torch.device:
        return torch.device("cpu")

    def join(self, launch: Launch) -> World:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

        store = dist.HashStore()
        dist.init_process_group(self.torch_name(), store=store, rank=launch.rank, world_size=launch.size)
        return World(
            size=launch.size,
            local_size=launch.local_size,
            data_size=launch.size,
            device=self.device(launch),
            store=store,
        )
