"""Accelerate: a file that people bring from there, honoured by Accelerate's own wrapping, under this loop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from strategies import _ddp, _fsdp_memory
from strategies._accelerate_config import AccelerateConfig
from strategies._ddp import Replica
from strategies._ddp_traffic import Messages
from strategies._fully_sharded import Shards, own_output
from strategies._torch import TorchStrategy
from strategies.backends import Backend, check_everywhere, connect_ranks, disconnect_ranks
from strategies.base import Batch, Footprint, LossFunction, LossSum, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.world import Launch, World

_LOGGER = logging.getLogger("shardwright")


@final
@dataclass(kw_only=True)
class AccelerateStrategy(TorchStrategy):
    """What a file of `accelerate config` asks for: one process, data parallel, or FSDP (version 2).

    Raises:
        ConfigError: in `connect`, where the file asks for anything else, or Accelerate isn't installed.
    """

    config_path: str | None = None
    """File that `accelerate config` wrote (YAML or JSON); null: data parallel, on as many processes as there are."""
    find_unused: bool = False
    """Look for parameters that a step doesn't use; costs a walk over the graph in every step. Needless for FSDP."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._accelerator: Any = None
        self._config: AccelerateConfig | None = None
        self._replica: Replica | None = None
        self._shards: Shards | None = None

    libraries = ("accelerate",)

    def refuse_job(self, backend: Backend, launch: Launch, plan: Plan, model: ModelSpec) -> None:
        self._checked(launch).refuse_plan(plan)

    def connect(self, backend: Backend) -> World:
        launch = Launch.from_env()

        def look() -> None:
            self._config = self._checked(launch)

        check_everywhere("accelerate", look)
        assert self._config is not None
        self._world = connect_ranks(backend)
        try:
            self._refuse_different_files(self._config, self._world)
            with self._world.together():
                self._accelerator = _accelerator(self._config, launch, self._world)
        except BaseException:
            self.close()
            raise
        return self._world

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        config = AccelerateConfig.read(self.config_path)
        if config.distributed_type != "FSDP":
            return _ddp.predicted(model, world, plan, Messages(find_unused=self.find_unused))
        given = config.fsdp_arguments()
        parts = _fsdp_memory.cut(
            model, world.size, given["transformer_cls_names_to_wrap"] or [], given.get("min_num_params")
        )
        return _fsdp_memory.predicted(
            model, plan, parts, ranks=world.size, kept=0.0 if given["reshard_after_forward"] else 1.0
        )

    def close(self) -> None:
        if self._accelerator is not None:
            _forget()
        if self._shards is not None:
            self._shards.close()
        self._world = self._run = self._accelerator = self._config = self._replica = self._shards = None
        disconnect_ranks()

    def _checked(self, launch: Launch) -> AccelerateConfig:
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"AccelerateStrategy: accelerate can't be imported ({error}). Install it (pip install accelerate), or "
                "use strategy=ddp (strategy)."
            ) from error
        config = AccelerateConfig.read(self.config_path)
        config.refuse_launch(launch)
        if self.find_unused and config.distributed_type == "FSDP":
            raise ConfigError(
                "AccelerateStrategy: find_unused=true means nothing with distributed_type: FSDP, where any parameter "
                "may be unused. Leave it out (strategy.find_unused)."
            )
        return config

    def _refuse_different_files(self, config: AccelerateConfig, world: World) -> None:
        """Each machine reads its own."""
        said = world.gather(config.with_say)
        for rank, theirs in enumerate(said):
            for key in sorted(said[0].keys() | theirs.keys()):
                if said[0].get(key) != theirs.get(key):
                    raise ConfigError(
                        f"AccelerateStrategy: the file isn't the same everywhere: {key}: {said[0].get(key)} for rank 0 "
                        f"and {theirs.get(key)} for rank {rank}. Copy one to all machines (strategy.config_path)."
                    )

    # What TorchStrategy asks for.

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        assert self._config is not None
        self._config.refuse_plan(plan)
        if ignored := self._config.without_say:
            _LOGGER.info("%s: %s have no say under this loop", self._config.source, ", ".join(ignored))
        self._replica = self._shards = None
        if self._config.distributed_type == "FSDP":
            return self._cut(model)
        handler = _ddp_handler(_ddp.arguments(model, plan, find_unused=self.find_unused))
        self._accelerator.ddp_handler = handler
        wrapped: nn.Module = self._accelerator.prepare(model)
        if isinstance(wrapped, DistributedDataParallel):
            self._replica = Replica(wrapped, self._connected, type(self).__name__, self._clock)
        self._accelerator.free_memory()  # it would hold the model beyond its time
        return wrapped

    def _cut(self, model: nn.Module) -> nn.Module:
        assert self._config is not None
        # Accelerate cuts a model together with its optimizer alone, and ours is made of what is cut.
        stand_in = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.0)
        try:
            cut: nn.Module = self._accelerator.prepare(model, stand_in)[0]
        except (KeyError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"AccelerateStrategy: Accelerate can't cut this model as {self._config.source} asks: {reason}. "
                "Change its fsdp_config, or use strategy=fsdp_full (strategy.config_path)."
            ) from error
        assert cut is model, "cut in place"
        self._shards = Shards(cut, self._connected, groups=1, every_micro_batch=True)
        for part in self._shards.parts:
            assert isinstance(part, nn.Module)
            part.register_forward_hook(own_output, prepend=True)
        self._accelerator.free_memory()
        return cut

    def _bare(self, model: nn.Module) -> nn.Module:
        bare: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        return bare

    def _synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        if self._shards is not None:
            return self._shards.synchronised(last=last, only=self._set_up.plan.accumulation == 1)
        return contextlib.nullcontext() if self._replica is None else self._replica.synchronised(model, last)

    def evaluate(self, model: nn.Module, batch: Batch, loss_function: LossFunction) -> LossSum:
        with self._cut_again():
            return super().evaluate(model, batch, loss_function)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        with self._cut_again():
            return super().predict(model, batch)

    @contextlib.contextmanager
    def _cut_again(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._shards is not None:
                self._shards.cut_again()

    def _global_norm(self, norm: Tensor) -> Tensor:
        return norm if self._shards is None else self._shards.global_norm(norm)

    def _communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        return super()._communication(model) if self._replica is None else self._replica.communication(model)


def _accelerator(config: AccelerateConfig, launch: Launch, world: World) -> Any:
    """An Accelerator on the groups that exist, of the type asked for.

    Raises:
        ConfigError: Accelerate made another of it, as it silently does for FSDP where there is no GPU.
    """
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    config.refuse_device(world.device)
    wanted = config.distributed_type
    if wanted is None:
        wanted = "NO" if world.size == 1 else "MULTI_GPU" if world.device.type == "cuda" else "MULTI_CPU"
    _forget()
    with _environment({} if wanted == "NO" else _variables(launch)):
        plugin = FullyShardedDataParallelPlugin(**config.fsdp_arguments()) if wanted == "FSDP" else None
        made = Accelerator(
            cpu=world.device.type == "cpu", mixed_precision="no", fsdp_plugin=plugin, device_placement=False
        )
    found = (made.distributed_type.value, made.num_processes)
    if found != (wanted, world.size):
        _forget()
        raise ConfigError(
            f"AccelerateStrategy: {config.source}: distributed_type: {wanted} on {world.size} processes with "
            f"{world.device.type} becomes {found[0]} on {found[1]}, which isn't what was asked for. "
            f"Ask for {'MULTI_CPU' if world.device.type == 'cpu' else 'MULTI_GPU'}, or start it on other machines "
            "(strategy.config_path)."
        )
    return made


def _variables(launch: Launch) -> dict[str, str]:
    names = {"RANK": launch.rank, "LOCAL_RANK": launch.local_rank, "WORLD_SIZE": launch.size,
             "LOCAL_WORLD_SIZE": launch.local_size}  # fmt: skip
    return {name: str(value) for name, value in names.items()}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """What Accelerate is to see of the launch: these variables and none that `accelerate launch` sets, whose settings
    have been read. It writes some itself; all is put back.
    """
    before = dict(os.environ)
    taken = ("ACCELERATE_", "FSDP_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "MPI_")
    launching = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in before:
        if name.startswith(taken) or name in launching:
            del os.environ[name]
    os.environ.update(variables)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # it would set another number
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)


def _forget() -> None:
    """Accelerate keeps its settings for the whole process, and takes no others after."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _ddp_handler(arguments: dict[str, Any]) -> Any:
    """What Accelerate takes for DistributedDataParallel. Its own class has older names, about which torch warns."""
    from accelerate import DistributedDataParallelKwargs

    handler = DistributedDataParallelKwargs()
    handler.to_kwargs = lambda: arguments
    return handler
