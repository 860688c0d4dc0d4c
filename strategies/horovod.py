"""Data parallelism over Horovod: every rank holds the whole model, and Horovod combines the gradients."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies._horovod_elastic import HorovodElastic, in_elastic_mode
from strategies._horovod_reducer import Reducer
from strategies._horovod_start import library, refuse_another_start, stop
from strategies._horovod_start import start as start_horovod
from strategies._statistics import statistics_of, take_over
from strategies._torch import TorchStrategy
from strategies._traffic import statistics, up_to
from strategies.backends import Backend, check_everywhere, connect_ranks, disconnect_ranks
from strategies.base import Collective, Footprint, ModelSpec, Plan, WorldSpec
from strategies.errors import ConfigError
from strategies.footprint import merged
from strategies.world import Launch, World, open_store

_FUSION_BYTES = 128 << 20
"""What small gradients travel together in, unless HOROVOD_FUSION_THRESHOLD says otherwise."""


class Compression(Enum):
    """What travels in place of the gradients."""

    none = "none"
    fp16 = "fp16"
    """Half as many bytes; slower on CPU, where fp16 has no instructions of its own."""


class Reduction(Enum):
    """How the ranks' gradients become one. The first two are the gradient of the global batch's mean loss."""

    average = "average"
    """Added up, then divided by the number of ranks."""
    sum = "sum"
    """Divided by the number of ranks, then added up: with fp16 compression the sum of many ranks can't overflow."""
    adasum = "adasum"
    """Adasum (Maleki et al. 2021): what points the same way is averaged, what is orthogonal is added. Needs MPI."""


@final
@dataclass(kw_only=True)
class HorovodStrategy(TorchStrategy):
    """Horovod's all-reduce, started gradient by gradient while backward still runs."""

    compression: Compression = Compression.none
    """What travels in place of fp32 gradients."""
    op: Reduction = Reduction.average
    """How the ranks' gradients become one; average and sum mean the same gradient."""
    commit_every: int | None = None
    """Optimizer steps between copies in memory, from which a run goes on that has lost workers; null: it can't."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.commit_every is not None and self.commit_every < 1:
            raise ConfigError(
                f"HorovodStrategy: commit_every={self.commit_every} is not positive. Give a number of steps above 0, "
                "or use strategy=horovod (strategy.commit_every)."
            )
        self._elastic: HorovodElastic | None = None
        self._reducer: Reducer | None = None
        self._statistics: list[Tensor] = []  # buffers that training changes
        self._stop: weakref.finalize[[], HorovodStrategy] | None = None

    libraries = ("horovod",)

    def refuse_job(self, backend: Backend, launch: Launch, plan: Plan, model: ModelSpec) -> None:
        self._refuse_impossible(launch, backend)

    def elastic(self) -> HorovodElastic | None:
        if self._elastic is None and self.commit_every is not None and in_elastic_mode():
            self._elastic = HorovodElastic(self.commit_every)
        return self._elastic

    def connect(self, backend: Backend) -> World:
        launch = Launch.from_env()
        check_everywhere("horovod", lambda: self._refuse_impossible(launch, backend))
        number = open_store(launch).add(f"horovod/{launch.rank}", 1)
        world = self._world = replace(connect_ranks(backend), elastic=self.elastic())
        try:
            if world.size > 1:
                # Also where nobody calls `close`: the others would wait for this rank, and a second start fail.
                self._stop = weakref.finalize(self, stop)
                start_horovod(world, number, backend.timeout_s)
            if self._elastic is not None:
                self._elastic.met(world)
        except BaseException:
            self.close()
            raise
        return world

    def _refuse_impossible(self, launch: Launch, backend: Backend) -> None:
        horovod = library()
        if self.commit_every is not None and not in_elastic_mode():
            raise ConfigError(
                "HorovodStrategy: commit_every needs horovodrun's elastic mode, and these ranks weren't started by it. "
                "Start them with horovodrun -np 2 --min-np 1 --host-discovery-script ./hosts.sh --network-interfaces "
                "eth0 python ..., or use strategy=horovod (strategy, strategy.commit_every)."
            )
        refuse_another_start(launch)
        if backend.torch_name() != "gloo" and not horovod.nccl_built():
            raise ConfigError(
                f"HorovodStrategy: the backend is {backend.torch_name()}, and the installed Horovod was built without "
                "NCCL. Build it with scripts/install_horovod.sh --nccl, or use backend=gloo (backend)."
            )
        if self.op is not Reduction.adasum:
            return
        if not horovod.mpi_built():
            raise ConfigError(
                "HorovodStrategy: op=adasum needs MPI, and the installed Horovod was built without it. Build it with "
                "scripts/install_horovod.sh --mpi, or use op=average (strategy.op)."
            )
        if not launch.by_mpi:
            raise ConfigError(
                "HorovodStrategy: op=adasum needs MPI, and these ranks weren't started by it. Start them with mpirun, "
                "or use op=average (strategy.op)."
            )
        if launch.size & (launch.size - 1):
            raise ConfigError(
                f"HorovodStrategy: op=adasum combines ranks in pairs, and {launch.size} isn't a power of two. "
                "Use 2, 4, 8 ... ranks, or op=average (strategy.op)."
            )

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        number = plan.precision.master_dtype.itemsize
        gradients = model.num_trainable * number
        is_cut = self.compression is Compression.fp16
        sent = model.num_trainable * (2 if is_cut else number)
        key = ("horovod", is_cut, world, number)
        gradients_sent = model.once(key, lambda: merged(self._gradients(model, world, number)))
        return Footprint(
            weights_bytes=model.num_parameters * number,
            gradients_bytes=gradients,
            gradients_come=plan.accumulation == 1,
            moments_bytes=int(model.num_trainable * model.slots_per_parameter * number),
            activations_bytes=model.activation_bytes_per_sample * plan.micro_batch,
            # Horovod's buffer, in which small gradients travel together; and the fp16 copies of all of them.
            buffers_bytes=(_FUSION_BYTES if world.size > 1 else 0) + (sent if is_cut else 0),
            collectives=merged([*gradients_sent, *statistics(model, plan, world.size)]),
        )

    def _gradients(self, model: ModelSpec, world: WorldSpec, number: int) -> Iterator[Collective]:
        """As Horovod fuses them where all that fit are ready in time, with the count of who used what (`Reducer`)."""
        number = 2 if self.compression is Compression.fp16 else number
        trained = model.trained()
        sizes = [value.numel() * number for value in trained] or [model.num_trainable * number]
        for message in up_to([*sizes, len(trained) * number], _FUSION_BYTES):
            yield Collective(kind="all_reduce", payload_bytes=sum(message), count=1, ranks=world.size)

    def close(self) -> None:
        if self._reducer is not None:
            self._reducer.close()
        if self._stop is not None:
            self._stop()
        self._world = self._run = self._reducer = self._stop = None
        self._statistics = []
        disconnect_ranks()

    # What TorchStrategy asks for.

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        world = self._connected
        if self._reducer is not None:
            self._reducer.close()
            self._reducer = None
        if world.size > 1:
            for value in (*model.parameters(), *model.buffers()):  # every rank starts from rank 0's
                _share(value.detach())
            self._reducer = Reducer(
                model,
                average=self.op is Reduction.average,
                adasum=self.op is Reduction.adasum,
                fp16=self.compression is Compression.fp16,
                clock=self._clock,
            )
        self._statistics = statistics_of(model) if world.size > 1 else []
        return model

    def _bare(self, model: nn.Module) -> nn.Module:
        return model

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        take_over(self._statistics)
        if self._reducer is None or not last:
            yield
            return
        with self._reducer.sending():
            yield
        begin = time.perf_counter()
        self._reducer.wait()
        self._clock.waited(begin)


def _share(value: Tensor) -> None:
    """Rank 0's numbers, whatever their type: Horovod and Gloo don't know all."""
    whole = value.contiguous()
    dist.broadcast(whole.reshape(-1).view(torch.uint8), 0)
    if whole is not value:
        value.copy_(whole)
