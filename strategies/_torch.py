"""What strategies share whose model is a torch module and whose optimizer is torch's own."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies._communication import CommunicationClock, measured
from strategies.base import (
    Batch,
    LossFunction,
    LossSum,
    MakeOptimizer,
    Plan,
    State,
    StepInfo,
    Strategy,
    Weights,
)
from strategies.blocks import find_blocks
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from strategies.timing import phase
from strategies.world import World


@dataclass
class _Run:
    """What lives between `setup` and `close`."""

    plan: Plan
    clock: CommunicationClock
    scaler: torch.amp.GradScaler | None = None


@dataclass(kw_only=True)
class TorchStrategy(Strategy):
    """The ordinary loop over micro-batches, the ordinary step, and state by name."""

    def __post_init__(self) -> None:
        self._world: World | None = None
        self._run: _Run | None = None

    # What a plugin says for itself.

    @abstractmethod
    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        """The trained module around `model`, whose parameters are in place."""

    @abstractmethod
    def _bare(self, model: nn.Module) -> nn.Module:
        """The module that was wrapped."""

    @abstractmethod
    def _synchronised(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around one micro-batch: ranks exchange gradients only when `last`."""

    def _backward(self, model: nn.Module, loss: Tensor) -> None:
        """The backward pass of one micro-batch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _global_norm(self, norm: Tensor) -> Tensor:
        """The norm over all ranks, from that of this rank's part of the gradients."""
        return norm

    def _communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        """Seconds of communication of the step just taken: exposed, and in all; None: not known."""
        return self._clock.take()

    # What follows from it.

    @property
    def _connected(self) -> World:
        assert self._world is not None, "connect() comes first"
        return self._world

    @property
    def _set_up(self) -> _Run:
        assert self._run is not None, "setup() comes first"
        return self._run

    @property
    def _clock(self) -> CommunicationClock:
        return self._set_up.clock

    def init_context(self, plan: Plan) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @final
    def setup(
        self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer, plan: Plan
    ) -> tuple[nn.Module, Optimizer]:
        device = self._connected.device
        plan.precision.check(device)
        self._run = run = _Run(plan=plan, clock=CommunicationClock(self._connected))
        model = self._placed(model, weights, plan)
        wrapped = self._wrap(model, plan)
        if plan.precision.numbers is Numbers.fp16:
            run.scaler = torch.amp.GradScaler(
                device.type,
                init_scale=plan.precision.loss_scale,
                growth_interval=plan.precision.growth_interval,
            )
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        return self._joined(wrapped, make_optimizer(trained))

    def _joined(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Both as `setup` hands them back, for a plugin that takes hold of them together."""
        return model, optimizer

    def _placed(self, model: nn.Module, weights: Weights, plan: Plan) -> nn.Module:
        """`model` with its values, where this rank computes."""
        model = materialise(model, weights, self._connected.device, plan.precision)
        if plan.activation_checkpointing is not None:
            plan.activation_checkpointing.apply(find_blocks(model))
        if plan.compile:
            model.compile()
        return model

    @measured
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        run, world = self._set_up, self._connected
        if not self._bare(model).training:
            model.train()
        sums = LossSum(
            loss=torch.zeros(
                (), dtype=torch.float64 if world.device.type == "cpu" else torch.float32, device=world.device
            )
        )
        # Ranks average their gradients: times the number of replicas, that is a sum again.
        weight = world.data_size / total
        for index, batch in enumerate(map(self._in_master_dtype, batches)):
            with self._synchronised(model, last=index == run.plan.accumulation - 1):
                with phase("forward"), run.plan.precision.autocast(world.device):
                    terms = loss_function(model(**batch.inputs), batch)
                loss = terms.loss * weight
                if terms.auxiliary is not None:
                    loss = loss + terms.auxiliary / run.plan.accumulation
                if run.scaler is not None:
                    loss = run.scaler.scale(loss)
                with phase("backward"):
                    self._backward(model, loss)
            sums.add(terms, batch.num_targets)
        return sums

    def evaluate(self, model: nn.Module, batch: Batch, loss_function: LossFunction) -> LossSum:
        world, batch = self._connected, self._in_master_dtype(batch)
        sums = LossSum(loss=torch.zeros((), dtype=torch.float32, device=world.device))
        with torch.no_grad(), self._set_up.plan.precision.autocast(world.device):
            sums.add(loss_function(self._forward_only(model, batch), batch), batch.num_targets)
        return sums

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        with torch.no_grad(), self._set_up.plan.precision.autocast(self._connected.device):
            return self._forward_only(model, self._in_master_dtype(batch))

    def _forward_only(self, model: nn.Module, batch: Batch) -> Any:
        bare = self._bare(model)
        if bare.training:
            model.eval()
        return bare(**batch.inputs)

    def _in_master_dtype(self, batch: Batch) -> Batch:
        """The same batch; with its fractions in double where all is."""
        if self._set_up.plan.precision.master_dtype is not torch.float64:
            return batch
        return batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    @measured
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        run = self._set_up
        if run.scaler is not None:
            run.scaler.unscale_(optimizer)
        gradients = [part(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self._global_norm(torch.nn.utils.get_total_norm(gradients))
        if gradients and run.plan.clip_norm is not None and _is_long(norm, run.plan.clip_norm):
            # As torch.nn.utils.clip_grads_with_norm_ does, which takes parameters and not a rank's parts.
            torch._foreach_mul_(gradients, torch.clamp(run.plan.clip_norm / (norm + 1e-6), max=1.0))
        skipped = step_if_finite(norm, optimizer)
        if run.scaler is not None:
            run.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        exposed, whole = self._communication(model)
        return StepInfo(grad_norm=norm, skipped=skipped, communication_s=exposed, communication_total_s=whole)

    def weights(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        return weights_by_name(self._bare(model))[0]

    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        weights, aliases = weights_by_name(self._bare(model))
        return State(
            weights=weights,
            optim=moments_by_name(self._bare(model), optimizer),
            scaler=self._scaler_state(),
            aliases=aliases,
        )

    def state_template(self, model: nn.Module, optimizer: Optimizer) -> State:
        state = self.state(model, optimizer)
        # Loading writes into these: fresh storage for the moments, so that a live one isn't half-written.
        state.optim = {name: torch.zeros_like(value) for name, value in state.optim.items()}
        return state

    def load_state(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        bare = self._bare(model)
        mine, _ = weights_by_name(bare)
        check_names("weights", mine, state.weights)
        slots = moments_by_name(bare, optimizer)
        check_names("optimizer moments", slots, state.optim)
        with torch.no_grad():
            for name, value in mine.items():
                if value is not state.weights[name]:
                    value.copy_(state.weights[name])
        for name, parameter in bare.named_parameters():
            if not parameter.requires_grad:
                continue
            prefix = f"{name}/"
            optimizer.state[parameter] = {
                key.removeprefix(prefix): state.optim[key].to(template.device, template.dtype).clone()
                for key, template in slots.items()
                if key.startswith(prefix)
            }
        self._load_scaler(state)

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        full = {}
        for name, value in self._bare(model).state_dict().items():
            gathered = value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
            if self._connected.rank == 0:
                # Copied also where the model is on CPU: training goes on while somebody writes or averages this.
                full[name] = gathered.to("cpu", copy=True)
        return full

    def _load_scaler(self, state: State) -> None:
        scaler = self._set_up.scaler
        if scaler is not None and state.scaler:
            scaler.load_state_dict(
                {
                    **scaler.state_dict(),
                    "scale": state.scaler["scale"],
                    "_growth_tracker": int(state.scaler["growth_tracker"]),
                }
            )

    def _scaler_state(self) -> dict[str, float]:
        scaler = self._set_up.scaler
        if scaler is None:
            return {}
        known = scaler.state_dict()
        return {"scale": float(known["scale"]), "growth_tracker": float(known["_growth_tracker"])}


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def materialise(model: nn.Module, weights: Weights, device: torch.device, precision: Precision) -> nn.Module:
    """The model with real storage on `device`, in its master dtype; filled from `weights` where it had none."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        aliases = aliases_of(model)
        model.to_empty(device=device)  # gives each name storage of its own
        for alias, name in aliases.items():
            module, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(name))
        weights.fill(model)
    else:
        model.to(device)
    return model.double() if precision.master_dtype is torch.float64 else model


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters -> the name under which each is stored."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: names[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names[id(parameter)] != name
    }


def _is_long(norm: Tensor, limit: float) -> bool:
    """Whether clipping changes anything. Only found out where that doesn't wait: a device clips by 1 instead."""
    surely = limit * (1 - 1e-6)  # of what clipping divides by, in whichever precision
    return norm.device.type != "cpu" or not norm.item() + 1e-6 < surely


def step_if_finite(norm: Tensor, optimizer: Optimizer) -> Tensor:
    """Step `optimizer`, or change nothing where `norm` isn't finite; 0-d bool: it isn't.

    Fused optimizers read the flag on the device. For the others it is read here, which waits for
    the device once per step; on CPU there is nothing to wait for.
    """
    if norm.device.type == "cpu":
        finite = math.isfinite(norm.item())
        if finite:
            optimizer.step()
        return torch.tensor(not finite)
    skipped = ~torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(skipped):
        optimizer.step()
    return skipped


def weights_by_name(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Live parameters and persistent buffers, tied ones once, and the other names of the tied ones.

    Raises:
        ConfigError: the model keeps something in its state dict that isn't a tensor.
    """
    live = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    canonical = [name for name, _ in model.named_parameters()]
    for name in [*(n for n in canonical if n in live), *(n for n in live if n not in set(canonical))]:
        value = live[name]
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"Model: the state dict entry {name!r} is {type(value).__name__}, not a tensor, and can't be "
                "checkpointed. Keep it in a buffer instead (the model's get_extra_state)."
            )
        if id(value) in names:
            aliases[name] = names[id(value)]
        else:
            names[id(value)] = name
            weights[name] = value.detach()
    return weights, aliases


def moments_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`<parameter>/<slot>` -> live moment; zeros of the right shape where there is none yet."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            slots = optimizer.state.get(parameter) or fresh_slots(parameter, optimizer, group)
            for slot, value in slots.items():
                if value is None:
                    continue
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                found[f"{names[id(parameter)]}/{slot}"] = tensor
    return found


def fresh_slots(parameter: nn.Parameter, optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The moments that `optimizer` would start `parameter` with, found by a step on a stand-in."""
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in group.items() if key in accepted and key != "params"}
    probe = type(optimizer)([stand_in], **{**options, "lr": 0.0})
    probe.step()
    return {
        slot: torch.zeros_like(value) if isinstance(value, Tensor) else type(value)()
        for slot, value in probe.state[stand_in].items()
        if value is not None
    }


def check_names(what: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Refuse a state whose names or shapes aren't this model's.

    Raises:
        ConfigError: names the first that is missing, unknown, or of another shape.
    """
    for name in mine.keys() - theirs.keys():
        raise ConfigError(_mismatch(what, f"{name!r} is missing", name, theirs))
    for name in theirs.keys() - mine.keys():
        raise ConfigError(_mismatch(what, f"{name!r} is not in this model", name, mine))
    for name, value in mine.items():
        if value.shape != theirs[name].shape:
            raise ConfigError(
                f"State: {what} {name!r} have shape {tuple(theirs[name].shape)} in the checkpoint and "
                f"{tuple(value.shape)} in this run. Use the configuration that wrote it (model, optimizer)."
            )


def _mismatch(what: str, problem: str, name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1)
    hint = f" (nearest: {near[0]!r})" if near else ""
    return f"State: {what}: {problem}{hint}. Use the configuration that wrote the checkpoint (model, optimizer)."
