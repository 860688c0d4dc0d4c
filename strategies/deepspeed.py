"""DeepSpeed's ZeRO: moments cut over the ranks, then gradients, then weights."""

from __future__ import annotations

import contextlib
import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies._communication import measured
from strategies._deepspeed import (
    brought_in,
    check_installed,
    compile_cpu_adam,
    cpu_adam,
    forget_engines,
    let_go,
    refuse_plan,
    say_local_rank,
    start_counting,
    unheard,
)
from strategies._deepspeed_config import BUCKET, Ours, check_optimizer, completed, merged, read
from strategies._deepspeed_fields import SUB_GROUP, Offload, check_fields, numbers, on_nvme, said
from strategies._fragments import FragmentedOptimizer, uncuttable
from strategies._nvme import NVMe, Place
from strategies._statistics import statistics_of, take_over
from strategies._torch import TorchStrategy
from strategies._zero import Partitions, partitions_of
from strategies._zero_memory import Lies, zero_footprint
from strategies._zero_traffic import PERSISTENT, Sizes
from strategies.backends import Backend, check_everywhere, connect_ranks, disconnect_ranks, sharing_device
from strategies.base import (
    Batch,
    Footprint,
    LossFunction,
    LossSum,
    ModelSpec,
    Plan,
    State,
    StepInfo,
    Weights,
    WorldSpec,
)
from strategies.errors import ConfigError
from strategies.world import Launch, World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh


@final
@dataclass(kw_only=True)
class DeepSpeedStrategy(TorchStrategy):
    """ZeRO of stage 1, 2 or 3. DeepSpeed cuts, sends and offloads; loss, clipping, precision, rates and the optimizer
    are those of every strategy.

    Raises:
        ConfigError: a setting is out of range, or two contradict each other.
    """

    stage: int = 2
    """What is cut over the ranks: 1 moments, 2 gradients too, 3 weights too."""
    bucket_mb: float | None = None
    """Gradients are reduced, and updated weights gathered, in buckets of this many MiB; null: 100."""
    overlap: bool | None = None
    """Reduce gradients while backward goes on; null: yes."""
    offload_optimizer: Offload = Offload.none
    """`cpu`: master weights and moments in host memory, and the step there. stage=3, `nvme`: they lie on a disk, and
    the step is on processors."""
    offload_parameters: Offload = Offload.none
    """stage=3, `cpu`: weights in host memory while they aren't gathered. `nvme`, beside `offload_optimizer=nvme`: on a
    disk."""
    nvme_path: str | None = None
    """A folder on NVMe of each machine; null: where temporary files lie."""
    sub_group_numbers: int | None = None
    """stage=3: so many numbers of a rank are stepped at a time; null: 1e9, with NVMe 1e8, each of which takes up to 60
    bytes of memory."""
    hpz: bool = False
    """stage=3: a second copy of the weights is cut over a few near ranks, so that gathering for the backward pass stays
    among them (ZeRO++)."""
    hpz_size: int | None = None
    """hpz=true: how many ranks; null: those of a machine."""
    persist_numbers: int | None = None
    """stage=3: parameters with fewer numbers stay gathered; null: 100000."""
    prefetch_mb: float | None = None
    """stage=3: weights that are gathered ahead, in MiB; null: 100."""
    cpu_adam: bool = False
    """Where the step is on processors: DeepSpeed's Adam in place of torch's; compiled when it is first used."""
    find_unused: bool = False
    """Ranks may use different parameters in a step; gradients are then reduced after backward, once per step."""
    config: dict[str, Any] = field(default_factory=dict)
    """A `ds_config`, for what has no field here."""
    config_path: str | None = None
    """A JSON file with one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mesh: DeviceMesh | None = None
        self._engine: Any = None
        self._parts: Partitions | None = None
        self._nvme: NVMe | None = None
        self._used: set[str] = set()  # in this step, on this rank
        self._statistics: list[Tensor] = []
        self._first_step = True
        self._near = 1  # ranks among which weights are gathered for the backward pass
        check_fields(self)

    libraries = ("deepspeed",)

    def refuse_job(self, backend: Backend, launch: Launch, plan: Plan, model: ModelSpec) -> None:
        check_installed()
        self._near_of(launch.size, launch.local_size)
        refuse_plan(self.stage, plan)

    def connect(self, backend: Backend) -> World:
        from torch.distributed.device_mesh import init_device_mesh

        check_everywhere("deepspeed", check_installed)
        launch = Launch.from_env()
        self._near = self._near_of(launch.size, launch.local_size)
        self._world = world = connect_ranks(backend)
        let_go()  # of the groups of somebody who didn't come to close them
        say_local_rank(world.local_rank)
        with world.together():  # a library that is broken on one machine
            brought_in(world.device)
        self._mesh = init_device_mesh(world.device.type, (world.size,))
        return world

    def _near_of(self, size: int, local_size: int) -> int:
        near = (self.hpz_size or local_size) if self.hpz else 1
        if size % near:
            what = "hpz_size" if self.hpz_size else "ranks of a machine: hpz_size"
            raise ConfigError(
                f"DeepSpeedStrategy: {what}={near} doesn't divide the {size} ranks of this run. "
                "Choose a divisor (strategy.hpz_size)."
            )
        return near

    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        refuse_plan(self.stage, plan)
        if not model.elementwise:
            raise uncuttable("the optimizer")
        on_disk = self.offload_optimizer is Offload.nvme
        return zero_footprint(
            model,
            world,
            plan,
            stage=self.stage,
            sizes=Sizes(
                bucket=numbers(self.bucket_mb) or BUCKET,
                prefetch=numbers(self.prefetch_mb) or BUCKET,
                persistent=PERSISTENT if self.persist_numbers is None else self.persist_numbers,
                near=self._near_of(world.size, world.local_size),
                sub_group=self.sub_group_numbers or (SUB_GROUP if on_disk else Sizes.sub_group),
                late=self.find_unused,
            ),
            lies=Lies(optimizer=self.offload_optimizer, weights=self.offload_parameters),
            overlaps=self.overlap is not False,
        )

    def close(self) -> None:
        self._drop_engine()
        self._world = self._run = self._mesh = None
        let_go()
        disconnect_ranks()

    # What TorchStrategy asks for.

    def _placed(self, model: nn.Module, weights: Weights, plan: Plan) -> nn.Module:
        refuse_plan(self.stage, plan)
        self._drop_engine()
        return super()._placed(model, weights, plan)

    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        forward = model.forward

        def computed(*args: Any, **kwargs: Any) -> Any:
            # The engine turns off what was turned on outside of it.
            with plan.precision.autocast(self._connected.device):
                return forward(*args, **kwargs)

        model.forward = computed
        return model

    def _joined(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        with self._connected.together():
            raw = read(self.config, self.config_path)
            check_optimizer(raw, optimizer)
            settings, place = self._settings(model, raw)
            if self.cpu_adam:
                self._refuse_adam_elsewhere()
                compile_cpu_adam()
                optimizer = cpu_adam(optimizer)
        fragmented = FragmentedOptimizer(optimizer, self._factor)
        names = {id(value): name for name, value in model.named_parameters()}
        deepspeed = brought_in(self._connected.device)
        start_counting()
        with unheard(), sharing_device():
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=fragmented, config=settings, dist_init_required=False
            )
        self._parts = partitions_of(self._engine, fragmented, names, self._connected, self._mesh)
        if place is not None:
            self._nvme = fragmented.nvme = NVMe(place, self._connected, self._engine, fragmented)
        self._engine._backward_epilogue = functools.partial(self._reduce_checked, self._engine._backward_epilogue)
        self._first_step = True
        self._statistics = statistics_of(self._engine.module)
        self._used.clear()
        for name, value in self._partitions.trained.items():
            value.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, name=name: self._used.add(name)
            )
        return self._engine, optimizer

    def _bare(self, model: nn.Module) -> nn.Module:
        bare: nn.Module = self._engine.module
        return bare

    def _reduce_checked(self, reduce: Callable[[], None]) -> None:
        """In the first step, find out before gradients are reduced: libraries end or hang where lengths differ."""
        if self._first_step and not self.find_unused:
            self._unused()
        reduce()

    def _backward(self, model: nn.Module, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    @measured
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        self._partitions.clear_gradients()
        whole = len(batches) == self._set_up.plan.accumulation
        if not (self.find_unused and whole):
            return super().forward_backward(model, batches, loss_function, total)
        with self._engine.coalesce_grad_reduction():
            try:
                sums = super().forward_backward(model, batches, loss_function, total)
                self._fill_in()
            except BaseException:
                for value in self._partitions.trained.values():  # else they would be reduced, and nobody comes to that
                    value.grad = None
                raise
        self._engine.set_gradient_accumulation_boundary(True)  # it was put back to what it was before
        return sums

    @contextlib.contextmanager
    def _synchronised(self, model: nn.Module, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        if self._connected.size > 1:
            take_over(self._statistics)
        yield

    @measured
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        run, world, zero = self._set_up, self._connected, self._engine.optimizer
        self._partitions.skip(self._unused())
        self._engine.step()
        if self._nvme is not None:
            self._nvme.end()
        self._used.clear()
        self._first_step = False
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32, device=world.device)
        skipped = torch.tensor(bool(zero.overflow), device=world.device)
        if run.scaler is not None:
            norm = norm / run.scaler.get_scale()
            self._rescale(run.scaler, skipped)
        exposed, whole = self._communication(model)
        return StepInfo(grad_norm=norm, skipped=skipped, communication_s=exposed, communication_total_s=whole)

    # The step.

    def _factor(self) -> float | Tensor:
        """What gradients are multiplied by: clipped, and without the loss scale. DeepSpeed has taken their norm."""
        run = self._set_up
        scale = 1.0 if run.scaler is None else run.scaler.get_scale()
        if run.plan.clip_norm is None:
            return 1 / scale
        norm = torch.as_tensor(self._engine.optimizer._global_grad_norm) / scale
        factor = torch.clamp(run.plan.clip_norm / (norm + 1e-6), max=1.0) / scale
        return float(factor) if factor.device.type == "cpu" else factor

    @staticmethod
    def _rescale(scaler: torch.amp.GradScaler, skipped: Tensor) -> None:
        """As GradScaler.update does, which would want to have unscaled the gradients itself."""
        assert scaler._scale is not None
        assert scaler._growth_tracker is not None
        torch._amp_update_scale_(
            scaler._scale,
            scaler._growth_tracker,
            skipped.float(),
            scaler.get_growth_factor(),
            scaler.get_backoff_factor(),
            scaler.get_growth_interval(),
        )

    @property
    def _partitions(self) -> Partitions:
        assert self._parts is not None, "setup() comes first"
        return self._parts

    def _unused(self) -> set[str]:
        """Trained parameters that no rank used in this step.

        Raises:
            ConfigError: the ranks used different ones, and that wasn't allowed; on every rank.
        """
        missing = sorted(self._partitions.trained.keys() - self._used)
        mine = float(zlib.crc32("\n".join(missing).encode())) if missing else 0.0
        most, least = self._connected.reduce([mine, -mine], "max")
        if most == -least:
            return set(missing)
        heard = self._connected.gather(missing)
        if not self.find_unused:
            name = min(set().union(*heard) - set(heard[0]).intersection(*heard))
            raise ConfigError(
                f"DeepSpeedStrategy: in one step some ranks used {name!r} and others didn't, so their gradients "
                "can't be added up. Let them wait for the end of backward (strategy.find_unused=true)."
            )
        return set(heard[0]).intersection(*heard)

    def _fill_in(self) -> None:
        """Zeros for what others used and this rank didn't, so that all ranks reduce the same in the same order."""
        trained = self._partitions.trained
        everywhere = self._unused()
        for name in trained.keys() - self._used - everywhere:
            self._partitions.give_zeros(name)

    # State.

    def weights(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        return self._partitions.weights()

    def compute_with(self, model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
        self._partitions.compute_with(weights)

    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        state = replace(self._partitions.state(), scaler=self._scaler_state())
        if self._nvme is not None:
            self._nvme.let_go()
        return state

    def state_template(self, model: nn.Module, optimizer: Optimizer) -> State:
        return replace(self._partitions.template(), scaler=self._scaler_state())

    def load_state(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        self._partitions.load_state(state)
        if self._nvme is not None:
            self._nvme.let_go()
        self._load_scaler(state)

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return self._partitions.full_state_dict()

    # Settings.

    def _settings(self, model: nn.Module, raw: Mapping[str, Any]) -> tuple[dict[str, Any], Place | None]:
        """What DeepSpeed is started with, and folders on NVMe."""
        hidden = getattr(getattr(model, "config", None), "hidden_size", None)
        ours = Ours(
            stage=self.stage,
            size=self._connected.size,
            plan=self._set_up.plan,
            hidden_size=hidden if isinstance(hidden, int) else None,
            own=said(self, self._near),
        )
        settings, place, unheeded = on_nvme(merged(raw, ours))
        if unheeded and self._connected.rank == 0:
            sys.stderr.write(
                f"ds_config: files on NVMe are mapped into memory, so without effect: {', '.join(unheeded)}\n"
            )
        return completed(settings, BUCKET, pin_memory=self._connected.device.type == "cuda"), place

    def _refuse_adam_elsewhere(self) -> None:
        if self._connected.device.type != "cpu" and self.offload_optimizer is Offload.none:
            raise ConfigError(
                f"DeepSpeedStrategy: cpu_adam=true steps on processors, and the moments are on "
                f"{self._connected.device.type}. Leave it out, or use strategy=zero3_offload (strategy.cpu_adam)."
            )

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            forget_engines()
        if self._nvme is not None:
            self._nvme.close()
        self._engine = self._parts = self._nvme = None
