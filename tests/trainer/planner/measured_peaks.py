"""What a training step really takes at its highest moment, beside what the planner predicts; in one process on CPU.

Other ranks aren't there: torch's fake process group stands for them, which changes no rank's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from strategies.activations import COSTLY_OPERATORS, ActivationCheckpointing
from strategies.backends import Backend, GlooBackend, NCCLBackend
from strategies.base import Batch, LossFunction, LossTerms, ModelSpec, Plan, Strategy, Weights, WorldSpec
from strategies.ddp import DDPStrategy
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.precision import Numbers, Precision
from strategies.simulated import SimulatedBackend
from strategies.single import SingleStrategy
from trainer.optim import AdamWOptimizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its micro-batch."""

    micro_batch: int
    length: int = 0
    architecture: str | None = None
    """Of transformers; None: `Convolutions`."""
    objective: str = "causal"
    config: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `HFModel`."""


SUBJECTS = {
    "llama": Subject(
        architecture="llama", micro_batch=4, length=96,
        config={"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 3000, "max_position_embeddings": 128},
    ),
    "bert": Subject(
        architecture="bert", objective="masked", micro_batch=4, length=96,
        config={"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
                "vocab_size": 3000, "max_position_embeddings": 128},
    ),
    "t5": Subject(
        architecture="t5", objective="seq2seq", micro_batch=4, length=96,
        config={"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 4, "vocab_size": 3000},
    ),
    "vit": Subject(
        architecture="vit", objective="image_classification", micro_batch=8,
        config={"image_size": 56, "patch_size": 8, "num_channels": 3, "hidden_size": 256, "intermediate_size": 1024,
                "num_hidden_layers": 4, "num_attention_heads": 4},
        more={"num_labels": 10},
    ),
    "convolutions": Subject(micro_batch=4),
}  # fmt: skip


class Convolutions(nn.Module):
    """A model that names no blocks: convolutions and a large linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96)
        self.convolutions = nn.Sequential(
            *(
                part
                for before, after in pairwise(widths)
                for part in (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
            )
        )
        self.hidden = nn.Linear(96 * 8 * 8, 500)
        self.head = nn.Linear(500, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(self.hidden(self.convolutions(pixels).flatten(1)).relu())
        return found


def _own_batch(samples: int) -> Batch:
    return Batch(
        inputs={"pixels": torch.zeros(samples, 3, 64, 64)},
        labels=torch.zeros(samples, dtype=torch.int64),
        num_targets=samples,
    )


def _own_loss(outputs: Tensor, batch: Batch) -> LossTerms:
    return LossTerms(loss=nn.functional.cross_entropy(outputs, batch.labels, reduction="sum"))


def facts(subject: Subject, precision: Precision, device: str, more: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model's facts, and what makes it."""
    from trainer.data.tokenizers import ByteTokenizer
    from trainer.models.hf import HFModel
    from trainer.models.objectives import Objective
    from trainer.planner.facts import ModelFacts, facts_of

    if subject.architecture is None:
        with torch.device("meta"):
            module = Convolutions()
        spec = ModelSpec.of(module)
        found = ModelFacts(
            module=module, batch=_own_batch, loss=_own_loss, spec=spec, precision=precision, device=device
        )
        return found, Convolutions
    model = HFModel(
        architecture=subject.architecture,
        objective=Objective[subject.objective],
        config=dict(subject.config),
        **subject.more,
        **more,
    )
    model.prepare(ByteTokenizer() if subject.objective == "masked" else None)
    return facts_of(model, 2.0, precision, length=subject.length, device=device), model.make


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of a subject."""

    subject: str
    strategy: type[Any] = SingleStrategy
    settings: Mapping[str, Any] = field(default_factory=dict)
    size: int = 1
    """Ranks, of which this process is the first."""
    numbers: str = "fp32"
    again: ActivationCheckpointing | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `HFModel`."""
    accumulation: int = 1
    more_samples: int = 1
    """Times the subject's micro-batch."""


CASES = {
    "llama": Case(subject="llama"),
    "bert": Case(subject="bert"),
    "t5": Case(subject="t5"),
    "vit": Case(subject="vit"),
    "convolutions": Case(subject="convolutions"),
    "llama, bf16": Case(subject="llama", numbers="bf16"),
    "convolutions, bf16": Case(subject="convolutions", numbers="bf16"),
    "llama, activations computed again": Case(subject="llama", again=ActivationCheckpointing()),
    "llama, products kept": Case(subject="llama", again=ActivationCheckpointing(keep=COSTLY_OPERATORS)),
    "llama, loss_chunk=64": Case(subject="llama", more={"loss_chunk": 64}),
    "llama, accumulation 2": Case(subject="llama", accumulation=2),
    "llama, DDP": Case(subject="llama", strategy=DDPStrategy),
    "convolutions, DDP": Case(subject="convolutions", strategy=DDPStrategy),
    "convolutions, DDP, accumulation 2": Case(subject="convolutions", strategy=DDPStrategy, accumulation=2),
    "llama, FSDP over 4": Case(subject="llama", strategy=FSDPStrategy, size=4),
    "llama, FSDP over 4, accumulation 2": Case(subject="llama", strategy=FSDPStrategy, size=4, accumulation=2),
    "bert, FSDP over 4": Case(subject="bert", strategy=FSDPStrategy, size=4),
    "vit, FSDP over 2, blocks kept whole": Case(
        subject="vit", strategy=FSDPStrategy, settings={"sharding": Sharding.grad_op}, size=2
    ),
    "convolutions, FSDP over 4": Case(subject="convolutions", strategy=FSDPStrategy, size=4),
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on one rank."""

    measured: int
    predicted: int
    """Without the margin for fragmentation, which isn't allocated."""
    parts: Mapping[str, int]
    """Of the prediction."""
    num_parameters: int


def peak(case: Case, device: str = "cpu") -> Peak:
    """Of a later step, and as predicted."""
    from trainer.planner.memory import memory

    subject, precision = SUBJECTS[case.subject], Precision(numbers=Numbers[case.numbers])
    samples = case.more_samples * subject.micro_batch
    found, make = facts(subject, precision, device, case.more)
    plan = Plan(
        micro_batch=samples,
        accumulation=case.accumulation,
        precision=precision,
        activation_checkpointing=case.again,
    )
    strategy = case.strategy(**case.settings)
    footprint = strategy.footprint(found.spec, WorldSpec(size=case.size, local_size=case.size), plan)
    predicted = memory(footprint, found.trace(samples, case.again))
    batch = found.batch(samples)
    there = device == "cuda" or case.size == 1
    backend = _backend(device) if there else SimulatedBackend(size=case.size, local_size=case.size)
    world = strategy.connect(backend)
    highest = _highest_on_gpu if device == "cuda" else _highest
    try:
        measured = highest(_Step(strategy, make, batch.to(world.device), found.loss, plan))
    finally:
        strategy.close()
    return Peak(
        measured=measured,
        predicted=predicted.in_use,
        parts=predicted.parts(),
        num_parameters=found.spec.num_parameters,
    )


def _backend(device: str) -> Backend:
    return NCCLBackend() if device == "cuda" else GlooBackend()


class _Step:
    """What is measured."""

    def __init__(
        self, strategy: Strategy, make: Callable[[], nn.Module], batch: Batch, loss: LossFunction, plan: Plan
    ) -> None:
        self._strategy, self._make, self._batch, self._loss, self._plan = strategy, make, batch, loss, plan

    def set_up(self) -> None:
        """The model, where it computes, and its optimizer."""
        nothing = Weights(seed=0, fill=lambda module: None)
        self._model, self._optimizer = self._strategy.setup(
            self._make(), nothing, lambda named: AdamWOptimizer().make(list(named)), self._plan
        )

    def take(self) -> None:
        """One step."""
        batches = [self._batch] * self._plan.accumulation
        self._strategy.forward_backward(self._model, batches, self._loss, float(self._batch.num_targets))
        self._strategy.step(self._model, self._optimizer)


_SETTLED = 3
"""Steps after which DistributedDataParallel has made its buckets anew, and Gloo's threads let the first ones go."""
_MEASURED = "the measured step"


def _highest(step: _Step) -> int:
    """Bytes that torch's allocator has given out, where they are most in a later step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step.set_up()
        for _ in range(_SETTLED):
            step.take()
        with record_function(_MEASURED):
            step.take()
    assert seen.profiler is not None
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == _MEASURED)
    changes = [event for event in events if event.name() == "[memory]"]
    taken = accumulate(event.nbytes() for event in changes)
    return max(there for there, event in zip(taken, changes, strict=True) if event.start_ns() >= begin)


def _highest_on_gpu(step: _Step) -> int:
    """The same, of CUDA's; without cuBLAS's workspaces, which backward's thread has, too."""
    square = torch.ones(64, 64, device="cuda", requires_grad=True)
    (square @ square).sum().backward()  # type: ignore[no-untyped-call]
    del square
    before = torch.cuda.memory_allocated()
    step.set_up()
    for _ in range(_SETTLED):
        step.take()
    torch.cuda.reset_peak_memory_stats()
    step.take()
    return torch.cuda.max_memory_allocated() - before
