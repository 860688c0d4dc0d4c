"""Strategies that are broken on purpose: each must fail the contract, in the test that names its fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.backends import Backend
from strategies.base import Batch, LossFunction, LossSum, MakeOptimizer, Plan, State, StepInfo, Strategy, Weights
from strategies.ddp import DDPStrategy
from strategies.testing import StrategyContract, Workers
from strategies.world import World

# `final` is for the type checker; here the point is to spoil one method at a time.


@dataclass(kw_only=True)
class ZeroedMoments(DDPStrategy):
    def load_state(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        moments = {name: torch.zeros_like(value) for name, value in state.optim.items()}
        super().load_state(model, optimizer, replace(state, optim=moments))


@dataclass(kw_only=True)
class ForgottenStepCount(DDPStrategy):
    def load_state(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        optim = {k: torch.zeros_like(v) if k.endswith("/step") else v for k, v in state.optim.items()}
        super().load_state(model, optimizer, replace(state, optim=optim))


@dataclass(kw_only=True)
class GradientOffByWorldSize(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        return super().forward_backward(model, batches, loss_function, total * self._connected.data_size)


@dataclass(kw_only=True)
class OwnTokenCount(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        own = max(1, sum(batch.num_targets for batch in batches)) * self._connected.data_size
        return super().forward_backward(model, batches, loss_function, own)


@dataclass(kw_only=True)
class MeanOfMicroBatches(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        def averaged(outputs: Any, batch: Batch) -> Any:
            terms = loss_function(outputs, batch)
            share = total / (max(1, batch.num_targets) * len(batches) * self._connected.data_size)
            terms.loss = terms.loss * share
            return terms

        return super().forward_backward(model, batches, averaged, total)


@dataclass(kw_only=True)
class NeighboursSamples(DDPStrategy):
    def connect(self, backend: Backend) -> World:
        world = super().connect(backend)
        self._world = replace(world, data_rank=max(0, world.data_rank - 1))
        return self._world


@dataclass(kw_only=True)
class ShiftedSamples(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        rolled = [replace(batch, inputs={k: v.roll(1, 0) for k, v in batch.inputs.items()}) for batch in batches]
        return super().forward_backward(model, rolled, loss_function, total)


@dataclass(kw_only=True)
class LastMicroBatchOnly(DDPStrategy):
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        if last:
            for parameter in model.parameters():
                parameter.grad = None
        return super()._synchronised(model, last)


@dataclass(kw_only=True)
class UnsharedGradients(DDPStrategy):
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        return super()._synchronised(model, last=False)


@dataclass(kw_only=True)
class ClippingBeforeReduction(DDPStrategy):
    def _synchronised(self, model: nn.Module, last: bool) -> Any:
        return super()._synchronised(model, last=False)

    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        parameters = [p for p in model.parameters() if p.grad is not None]
        limit = self._set_up.plan.clip_norm
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= self._connected.data_size  # type: ignore[misc]
        optimizer.step()
        optimizer.zero_grad()
        return StepInfo(grad_norm=norm, skipped=~torch.isfinite(norm))


@dataclass(kw_only=True)
class NormAfterClipping(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        info = super().step(model, optimizer)
        limit = self._set_up.plan.clip_norm
        return info if limit is None else replace(info, grad_norm=info.grad_norm.clamp(max=limit))


@dataclass(kw_only=True)
class NeverClips(DDPStrategy):
    def setup(
        self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer, plan: Plan
    ) -> tuple[nn.Module, Optimizer]:
        return super().setup(model, weights, make_optimizer, replace(plan, clip_norm=None))


@dataclass(kw_only=True)
class AppliesNonFinite(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return StepInfo(grad_norm=norm, skipped=~torch.isfinite(norm))


@dataclass(kw_only=True)
class HidesSkipping(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        info = super().step(model, optimizer)
        return replace(info, skipped=torch.zeros_like(info.skipped)) if self._connected.rank else info


@dataclass(kw_only=True)
class ZerosForUnused(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return super().step(model, optimizer)


@dataclass(kw_only=True)
class SumsAuxiliary(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        def summed(outputs: Any, batch: Batch) -> Any:
            terms = loss_function(outputs, batch)
            if terms.auxiliary is not None:
                terms.auxiliary = terms.auxiliary * self._set_up.plan.accumulation
            return terms

        return super().forward_backward(model, batches, summed, total)


@dataclass(kw_only=True)
class UntiedHead(DDPStrategy):
    def _wrap(self, model: nn.Module, plan: Plan) -> nn.Module:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # type: ignore[union-attr]
        return super()._wrap(model, plan)


@dataclass(kw_only=True)
class LosesFrozen(DDPStrategy):
    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        state = super().state(model, optimizer)
        trained = {name for name, value in self._bare(model).named_parameters() if value.requires_grad}
        return replace(state, weights={name: value for name, value in state.weights.items() if name in trained})


@dataclass(kw_only=True)
class PrefixedNames(DDPStrategy):
    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {f"module.{name}": value for name, value in super().full_state_dict(model).items()}


@dataclass(kw_only=True)
class StateOnEveryRank(DDPStrategy):
    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._bare(model).state_dict().items()}


@dataclass(kw_only=True)
class LiveStateDict(DDPStrategy):
    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return self._bare(model).state_dict() if self._connected.rank == 0 else {}


@dataclass(kw_only=True)
class StaysInEvaluation(DDPStrategy):
    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], loss_function: LossFunction, total: float
    ) -> LossSum:
        mode = model.training
        model.train = lambda mode=True: model  # type: ignore[method-assign,misc]
        sums = super().forward_backward(model, batches, loss_function, total)
        del model.train
        return sums if mode else replace(sums)


@dataclass(kw_only=True)
class EvaluatesInTraining(DDPStrategy):
    def _forward_only(self, model: nn.Module, batch: Batch) -> Any:
        return self._bare(model)(**batch.inputs)


@dataclass(kw_only=True)
class IgnoresPrecision(DDPStrategy):
    def setup(
        self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer, plan: Plan
    ) -> tuple[nn.Module, Optimizer]:
        return super().setup(model, weights, make_optimizer, replace(plan, precision=type(plan.precision)()))


@dataclass(kw_only=True)
class LeavesGroups(DDPStrategy):
    def close(self) -> None:
        self._world = self._run = None


@dataclass(kw_only=True)
class DriftingRanks(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        info = super().step(model, optimizer)
        if self._connected.rank == self._connected.size - 1:
            with torch.no_grad():
                next(model.parameters()).mul_(1 + 1e-7)
        return info


@dataclass(kw_only=True)
class SilentOnCommunication(DDPStrategy):
    def _communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        return None, super()._communication(model)[1]


@dataclass(kw_only=True)
class HidesAllCommunication(DDPStrategy):
    def _communication(self, model: nn.Module) -> tuple[float | None, float | None]:
        return 0.0, super()._communication(model)[1]


@dataclass(kw_only=True)
class ComputeIsCommunication(DDPStrategy):
    def step(self, model: nn.Module, optimizer: Optimizer) -> StepInfo:
        return replace(super().step(model, optimizer), communication_s=1.0, communication_total_s=1.0)


def contract(broken: type[Strategy]) -> type[StrategyContract]:
    """A contract over `broken`, which the workers find by name in this module."""

    def make(self: StrategyContract, *, unused: bool = False) -> Strategy:
        return broken(find_unused=unused)  # type: ignore[call-arg]

    name = f"Contract{broken.__name__}"
    made = type(name, (StrategyContract,), {"make": make, "__module__": __name__, "__qualname__": name})
    globals()[name] = made
    return made


Check = Callable[[StrategyContract, Workers], object]


def sgd(test: StrategyContract, workers: Workers, accumulation: int = 1) -> None:
    test.test_training_equals_one_process(workers, 2, accumulation, "sgd")


def sgd_accumulated(test: StrategyContract, workers: Workers) -> None:
    sgd(test, workers, 2)


def clipped(test: StrategyContract, workers: Workers) -> None:
    test.test_training_equals_one_process(workers, 2, 2, "sgd_clipped")


def resume(test: StrategyContract, workers: Workers) -> None:
    test.test_resume_continues_the_same(workers, 2)


def names(test: StrategyContract, workers: Workers) -> None:
    test.test_state_has_the_bare_models_names(workers, 2)


def evaluation(test: StrategyContract, workers: Workers) -> None:
    test.test_evaluation_changes_nothing_and_averages_over_counted_positions(workers, 2)


def non_finite(test: StrategyContract, workers: Workers) -> None:
    test.test_non_finite_step_changes_nothing(workers, "adamw")


def communication(test: StrategyContract, workers: Workers) -> None:
    test.test_communication_is_measured(workers, 2)


FAULTS: list[tuple[type[Strategy], Check, str]] = [
    (ZeroedMoments, resume, "loss|weight|moment"),
    (ForgottenStepCount, resume, "loss|weight|moment"),
    (GradientOffByWorldSize, sgd, "gradient norm|loss"),
    (OwnTokenCount, sgd, "loss"),
    (OwnTokenCount, sgd_accumulated, "loss"),
    (MeanOfMicroBatches, sgd_accumulated, "loss"),
    (NeighboursSamples, sgd, "loss"),
    (ShiftedSamples, sgd, "loss"),
    (LastMicroBatchOnly, sgd_accumulated, "loss"),
    (UnsharedGradients, sgd_accumulated, "differ"),
    (ClippingBeforeReduction, clipped, "differ|norm|loss"),
    (NormAfterClipping, clipped, "gradient norm"),
    (NeverClips, clipped, "loss"),
    (AppliesNonFinite, non_finite, "reports skipped"),
    (HidesSkipping, non_finite, "reports skipped"),
    (ZerosForUnused, lambda t, w: t.test_unused_parameter_is_left_alone(w, 2, 2), "spare"),
    (SumsAuxiliary, lambda t, w: t.test_auxiliary_terms_are_averaged(w, 2, 2), "loss"),
    (UntiedHead, sgd, "loss"),
    (UntiedHead, names, "aliases"),
    (LosesFrozen, sgd, "temper"),
    (PrefixedNames, names, "module"),
    (StateOnEveryRank, names, "on rank 1"),
    (LiveStateDict, lambda t, w: t.test_full_state_dict_stays_as_it_was(w), "changed"),
    (StaysInEvaluation, evaluation, "loss"),
    (EvaluatesInTraining, evaluation, "evaluated loss"),
    (EvaluatesInTraining, lambda t, w: t.test_prediction_equals_the_bare_model(w, 2), "prediction"),
    (IgnoresPrecision, lambda t, w: t.test_lower_precision_stays_near(w, "bf16"), "isn't in force"),
    (LeavesGroups, lambda t, w: t.test_nothing_is_left_after_close(w, 2), "left|twice"),
    (DriftingRanks, sgd, "differ"),
    (SilentOnCommunication, communication, "doesn't know"),
    (HidesAllCommunication, communication, "rank 0 waited"),
    (ComputeIsCommunication, communication, "in a step of"),
]
for _broken, _, _ in FAULTS:
    contract(_broken)
contract(DDPStrategy)


@pytest.mark.parametrize(
    ("broken", "check", "complaint"), FAULTS, ids=[f"{b.__name__}-{c.__name__.strip('<>')}" for b, c, _ in FAULTS]
)
def test_contract_with_a_broken_strategy_fails(
    workers: Workers, broken: type[Strategy], check: Check, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(globals()[f"Contract{broken.__name__}"](), workers)


def test_contract_with_the_unbroken_strategy_passes(workers: Workers) -> None:
    sound = globals()["ContractDDPStrategy"]()
    for _, check, _ in FAULTS:
        check(sound, workers)
