"""The seam: what a strategy is, and the values that cross it.

The Trainer calls the methods of `Strategy` and nothing else; a strategy never sees the Trainer.
Between them go the plain values of this module. Every strategy gives them the same meaning:

* the loss of a step is the sum over the counted tokens of the global batch, divided by their number;
* gradients are clipped by the L2 norm over all parameters on all ranks;
* a step whose gradient norm isn't finite changes no weight and no moment, and is reported;
* a parameter that got no gradient in the whole global step isn't touched, not even by decay;
* state has the bare model's names, whatever wraps the model.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.activations import ActivationCheckpointing
from strategies.backends import Backend
from strategies.elastic import Elastic
from strategies.footprint import Collective as Collective
from strategies.footprint import Footprint as Footprint
from strategies.footprint import ModelSpec as ModelSpec
from strategies.footprint import WorldSpec as WorldSpec
from strategies.precision import Precision
from strategies.world import Launch, World


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a strategy must know about a step before it wraps the model."""

    micro_batch: int
    """Samples that one rank takes through the model at a time."""
    accumulation: int = 1
    """Micro-batches of one rank in one optimizer step."""
    clip_norm: float | None = None
    """Largest L2 norm of the global gradient; None: no clipping."""
    precision: Precision = field(default_factory=Precision)
    compile: bool = False
    """Run the model through torch.compile."""
    activation_checkpointing: ActivationCheckpointing | None = None
    """Compute activations again in backward; None: keep them."""
    cast_weights: bool = False
    """Only for predictions of what others run: weights are cast to the compute dtype for the step, without autocast."""
    deferred: bool = False
    """The model's first values can be made after it was built (`Weights.fill`), so that it needs no storage before."""

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the weights that the model computes with."""
        return self.precision.compute_dtype if self.cast_weights else self.precision.master_dtype


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: Mapping[str, Any]
    """Keyword arguments of the model's forward; tensors have the samples along dim 0."""
    labels: Tensor
    """What the loss compares with, already shifted; -100 where a position doesn't count."""
    num_targets: int
    """Counted positions: the weight of this micro-batch in the loss."""
    num_tokens: int = 0
    """Real tokens, padding left out; for rates."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors for the loss or the metrics that the model doesn't take."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `function` applied to each tensor."""

        def each(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs={name: each(value) for name, value in self.inputs.items()},
            labels=function(self.labels),
            extras={name: function(value) for name, value in self.extras.items()},
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy doesn't block where the source is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory (called by torch's DataLoader)."""
        return self.map(lambda tensor: tensor.pin_memory())

    def weightless(self) -> Batch:
        """The same batch with no counted position: for ranks that ran out of samples."""
        return replace(self, labels=torch.full_like(self.labels, -100), num_targets=0, num_tokens=0)


Ratio: TypeAlias = tuple[Tensor, Tensor]
"""A metric as (sum, weight), both 0-d: exact however the samples are split."""


@dataclass(kw_only=True)
class LossTerms:
    """What a loss function says of one micro-batch."""

    loss: Tensor
    """0-d: summed over the counted positions (never averaged), with its graph."""
    auxiliary: Tensor | None = None
    """0-d: a mean-type term, such as a router's balance, already weighted; averaged over micro-batches."""
    metrics: Mapping[str, Ratio] = field(default_factory=dict)


LossFunction: TypeAlias = Callable[[Any, Batch], LossTerms]
"""From the model's outputs and the batch."""


@dataclass(kw_only=True)
class LossSum:
    """Losses added up over micro-batches of this rank, still on the device and without graph."""

    loss: Tensor
    num_targets: int = 0
    metrics: dict[str, Ratio] = field(default_factory=dict)

    def add(self, terms: LossTerms, num_targets: int) -> None:
        """Add one micro-batch; reads nothing back from the device."""
        self.loss = self.loss + terms.loss.detach()
        self.num_targets += num_targets
        for name, (value, weight) in terms.metrics.items():
            value, weight = value.detach(), weight.detach()
            if name in self.metrics:
                value, weight = self.metrics[name][0] + value, self.metrics[name][1] + weight
            self.metrics[name] = (value, weight)


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What an optimizer step did. The tensors stay on the device until somebody reads them."""

    grad_norm: Tensor
    """0-d: L2 norm of the global gradient before clipping; equal on every rank."""
    skipped: Tensor
    """0-d bool: the norm wasn't finite and nothing was updated; equal on every rank."""
    communication_s: float | None = None
    """Seconds of this step that waited for other ranks and hid behind no compute; None: not known."""
    communication_total_s: float | None = None  # the hidden ones too


@dataclass(kw_only=True)
class State:
    """A run's tensors under canonical names: what one checkpointer serves every strategy with.

    Tensors may be live (writing into them changes the model) and DTensor where sharded.
    """

    weights: dict[str, Tensor]
    """Parameters and persistent buffers by the bare model's names; tied ones once."""
    optim: dict[str, Tensor]
    """Moments as `<parameter>/<slot>`; zeros for a parameter that was never updated."""
    scaler: dict[str, float] = field(default_factory=dict)
    """Loss scale and its growth count; empty unless fp16."""
    local: dict[str, Tensor] = field(default_factory=dict)
    """What belongs to this rank alone, and means nothing at another world size."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Names of tied weights -> the name under which they are stored."""


NamedParameters: TypeAlias = Iterable[tuple[str, nn.Parameter]]
MakeOptimizer: TypeAlias = Callable[[NamedParameters], Optimizer]
"""Makes groups by name; called once, by the strategy, when the parameters are what will be trained."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where a model's first values come from, for a strategy that builds it without storage.

    `fill(module)` writes every parameter and buffer of a module that has real storage: from `seed`,
    or from the safetensors of `folder`. A strategy that builds the model plainly needs none of it.
    """

    seed: int
    fill: Callable[[nn.Module], None]
    folder: Path | None = None


@dataclass(kw_only=True)
class Strategy(ABC):
    """How one training job is spread over ranks.

    A subclass is a keyword-only dataclass whose fields are its configuration, so it is its own
    schema; what it can't do, it refuses with `ConfigError` in `__post_init__`, or in `connect`
    where the number of ranks decides: on every rank, before the first collective.

    Order of calls: `connect`; then `with init_context(plan)` the model is built; `setup`; any
    number of steps, evaluations and state calls; `close`. `setup` may be called again with another
    plan and a new model on the same connection.
    """

    can_simulate: ClassVar[bool] = False
    """Its steps can be run as one rank of many that aren't there, which `SimulatedBackend` does."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """What it needs besides torch: of two that are as good, `strategy=auto` takes the one that needs less."""

    def refuse_job(self, backend: Backend, launch: Launch, plan: Plan, model: ModelSpec) -> None:
        """Whether it could do a job here, asked before anything is connected; `strategy=auto` passes over it if not.

        Args:
            backend: that it would be connected with.
            launch: of this rank.
            plan: how a step would go.
            model: that would be trained.

        Raises:
            ConfigError: `connect` or `setup` would refuse it, as far as this machine can tell.
        """

    def elastic(self) -> Elastic | None:
        """What `connect` gives its World to go on with when ranks are lost or join; None: the run ends with them."""

    @abstractmethod
    def connect(self, backend: Backend) -> World:
        """Start the communication and say who is here.

        Raises:
            ConfigError: this strategy can't run on that many ranks, or the backend not on this machine; on every rank.
        """

    @abstractmethod
    def init_context(self, plan: Plan) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model is to be built: plain, or on the meta device."""

    @abstractmethod
    def setup(
        self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer, plan: Plan
    ) -> tuple[nn.Module, Optimizer]:
        """Wrap, shard and materialise the model, then make the optimizer.

        Args:
            model: as built under `init_context`.
            weights: used where the model has no storage yet.
            make_optimizer: makes the optimizer from `(name, parameter)` pairs with bare names.
            plan: how a step will go.

        Returns:
            The model and the optimizer to hand back to every other method. The optimizer's
            `param_groups` have an `lr` that the caller sets before each step.

        Raises:
            ConfigError: the plan asks for what this strategy can't honour; on every rank.
        """

    @abstractmethod
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        """Gradients of one step's mean loss, from all its micro-batches.

        Gradients are complete (reduced over ranks) when `plan.accumulation` micro-batches have
        been seen; with fewer, they stay local: that is how a micro-batch size is tried out.

        Args:
            model: from `setup`.
            batches: this rank's micro-batches, on its device.
            loss_function: token-summed loss of one micro-batch.
            total: counted positions of the global batch, over all ranks and micro-batches; > 0.

        Returns:
            This rank's sums, not yet reduced.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Batch, loss_function: LossFunction) -> LossSum:
        """The loss without gradients, in evaluation mode.

        Collective: every rank calls it equally often (those without samples left pass
        `batch.weightless()`).
        """

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs for this rank's batch, without gradients. Collective."""

    @abstractmethod
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        """Clip by the global norm, update unless the norm isn't finite, and clear the gradients."""

    @abstractmethod
    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        """The tensors of the run under canonical names. Collective."""

    def weights(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """`state().weights` alone, for what needs them in every step. Collective."""
        return self.state(model, optimizer).weights

    @torch.no_grad()
    def compute_with(self, model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
        """Compute with `weights` until they are put back, as evaluating an average does; no step may come between.
        Collective.

        Args:
            model: from `setup`.
            optimizer: from `setup`.
            weights: by canonical name, as `weights` gave them.
        """
        for name, live in self.weights(model, optimizer).items():
            live.copy_(weights[name])

    @abstractmethod
    def state_template(self, model: nn.Module, optimizer: Optimizer) -> State:
        """The same names and shapes to load into, also before the first step made moments. Collective."""

    @abstractmethod
    def load_state(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        """Take up `state`, whichever strategy wrote it. Collective.

        Raises:
            ConfigError: names or shapes aren't this model's; names the first that differ.
        """

    @abstractmethod
    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The bare model's state dict, whole and on CPU on rank 0; empty on the others. Collective."""

    @abstractmethod
    def footprint(self, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        """Predicted bytes on one rank and collectives of one step.

        Raises:
            ConfigError: it can't run on that many ranks.
        """

    def variants(self, world: WorldSpec) -> Iterable[tuple[str, Strategy]]:
        """This strategy with each setting that is worth comparing on such a world, and the words that choose it."""
        return [("", self)]

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind: no process group, no hook, no file. May be called twice."""
