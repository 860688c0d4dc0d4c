"""One process alone: the reference that every other strategy is held against."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from strategies._torch import TorchStrategy
from strategies.backends import Backend
from strategies.base import Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import World, open_store


@final
@dataclass(kw_only=True)
class SingleStrategy(TorchStrategy):
    """No communication at all."""

    can_simulate = True

    def connect(self, backend: Backend) -> World:
        launch = backend.launch()
        if launch.size != 1:
            raise ConfigError(
                f"SingleStrategy: strategy=single was started as {launch.size} processes. "
                "Use strategy=ddp, or start one process (strategy)."
            )
        self._world = World(device=backend.device(launch), store=open_store(launch))
        return self._world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        if world.size != 1:
            raise ConfigError(f"SingleStrategy: strategy=single can't run as {world.size} processes (strategy).")
        number = plan.precision.master_dtype.itemsize
        return Footprint(
            weights_bytes=model.num_parameters * number,
            gradients_bytes=model.num_trainable * number,
            moments_bytes=int(model.num_trainable * model.slots_per_parameter * number),
            activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
            gradients_come=plan.accumulation == 1,
            buffers_bytes=model.largest_gradient * number if plan.accumulation > 1 else 0,
            beside=(0,),
            collectives=(),
        )

    def close(self) -> None:
        self._world = self._run = None

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        return model

    def _bare(self, model: nn.Module) -> nn.Module:
        return model

    def _synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()
