"""Memory that ran out: on which rank, in which part of a step, and which settings would have taken less."""

from __future__ import annotations

import dataclasses
import gc
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from strategies.base import Footprint, ModelSpec, Plan, Strategy, WorldSpec
from strategies.errors import ConfigError, TrainingError
from strategies.world import World
from trainer.metrics.text import byte_size

_WORDS = ("allocate memory", "not enough memory", "out of memory")
_PLACES = {
    "evaluate_batches": "in an evaluation",
    "predict": "in a prediction",
    "save": "while a checkpoint was written",
    "forward_backward": "in the forward pass",
    "step": "in the optimizer's step",
    "setup": "while the model was set up",
}
"""Function on the way to where it happened -> what one calls that; the first that is met."""
_BACKWARD = "in the backward pass"
_IN_A_STEP = (_PLACES["forward_backward"], _BACKWARD, _PLACES["step"])
_WORTH_IT = 0.01
"""Share of a rank's memory that a setting must save to be named."""


class OutOfMemoryError(TrainingError):
    """A rank asked for memory that there isn't."""

    def __init__(self, message: str, spec: ModelSpec | None = None, plan: Plan | None = None) -> None:
        super().__init__(message)
        self.spec = spec
        """None: it happened before the model was known."""
        self.plan = plan


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation failed, by any library's way to say so."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in _WORDS)
    )


def out_of_memory(
    error: Exception, step: int | None = None, spec: ModelSpec | None = None, plan: Plan | None = None
) -> OutOfMemoryError:
    """`error` in words; what its frames hold is let go, so that there is memory to end in order.

    Args:
        error: `is_shortage` holds.
        step: the optimizer step under way; None: before the first.
        spec: the model, if there is one yet.
        plan: of the step.
    """
    place = _place(error)
    of_step = f" of step {step}" if step is not None and place in _IN_A_STEP else ""
    asked = re.search(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+) ?(\w+)", str(error))
    wanted = ""
    if asked is not None:
        wanted = f": {byte_size(float(asked[1])) if asked[2] == 'bytes' else ' '.join(asked.groups())} asked for"
    let_go(error)
    return OutOfMemoryError(f"out of memory{place and f' {place}'}{of_step}{wanted}", spec, plan)


def let_go(error: BaseException) -> None:
    """Drop what the finished calls on the way of `error` still hold, such as activations and connections."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__
    gc.collect()


@contextmanager
def told(step: Callable[[], int | None], spec: ModelSpec, plan: Plan) -> Iterator[None]:
    """Within, a lack of memory says what was being done.

    Raises:
        OutOfMemoryError: instead of each library's own error.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        raise out_of_memory(error, step(), spec, plan) from error


def _place(error: Exception) -> str:
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [code.co_name for code in frames]
    if "forward_backward" in names and any(code.co_filename.endswith("torch/autograd/graph.py") for code in frames):
        return _BACKWARD
    return next((_PLACES[name] for name in names if name in _PLACES), "")


@dataclass(frozen=True, kw_only=True)
class Others:
    """What could have been chosen instead."""

    strategies: Mapping[str, Strategy]
    slots: Mapping[str, float]
    """Optimizer -> moments that it keeps for each trainable number."""


def advice(shortage: OutOfMemoryError, strategy: Strategy, world: World, others: Others) -> str:
    """Settings that would take less memory, and how much less by the strategies' own predictions; one sentence or two.

    Args:
        shortage: what happened.
        strategy: the one in use.
        world: its ranks.
        others: to compare it with.
    """
    spec, plan = shortage.spec, shortage.plan
    if spec is None or plan is None:
        return "Use a smaller model or a strategy that shards (model, strategy)."
    size = WorldSpec(size=world.size, local_size=world.local_size)
    now = _bytes(strategy.footprint(spec, size, plan), world)
    saved: dict[str, int] = {}
    for words, predict in _choices(strategy, spec, size, plan, others):
        try:
            saving = now - _bytes(predict(), world)
        except ConfigError:  # not with this many ranks
            continue
        if saving >= _WORTH_IT * now and saving not in saved.values():
            saved[words] = saving
    besides = "" if spec.activation_bytes_per_sample else " besides activations"
    best = sorted(saved.items(), key=lambda entry: -entry[1])[:4]
    sentences = []
    if best:
        savings = ", ".join(f"{words} saves {byte_size(saving)}" for words, saving in best)
        sentences = [f"Of {byte_size(now)} predicted per rank{besides}, {savings}"]
    if (fewer := _fewer_samples(plan)) is not None and f"trainer.micro_batch={fewer}" not in saved:
        sentences.append(f"trainer.micro_batch={fewer} instead of {plan.micro_batch} saves activations in proportion")
    if plan.activation_checkpointing is None:
        sentences.append("trainer.activation_checkpointing=full keeps of a block's activations only its inputs")
    if not sentences:
        sentences = [f"{byte_size(now)} were predicted per rank{besides}: use a smaller model or shorter samples"]
    return f"{'; '.join(sentences)} (strategy, optimizer, trainer.micro_batch, trainer.activation_checkpointing)."


def _choices(
    strategy: Strategy, spec: ModelSpec, size: WorldSpec, plan: Plan, others: Others
) -> Iterator[tuple[str, Callable[[], Footprint]]]:
    """Each other setting in words, and what is predicted with it."""
    for name, other in others.strategies.items():
        yield f"strategy={name}", lambda other=other: other.footprint(spec, size, plan)  # type: ignore[misc]
    for key, value in dataclasses.asdict(strategy).items():
        if isinstance(value, bool):
            word = f"strategy.{key}={str(not value).lower()}"
            changed = {key: not value}
            yield word, lambda changed=changed: replace(strategy, **changed).footprint(spec, size, plan)  # type: ignore[misc]
    for name, slots in others.slots.items():
        with_slots = replace(spec, slots_per_parameter=slots)
        yield f"optimizer={name}", lambda it=with_slots: strategy.footprint(it, size, plan)  # type: ignore[misc]
    if (fewer := _fewer_samples(plan)) is not None:
        smaller = replace(plan, micro_batch=fewer, accumulation=plan.accumulation * plan.micro_batch // fewer)
        yield f"trainer.micro_batch={fewer}", lambda: strategy.footprint(spec, size, smaller)


def _fewer_samples(plan: Plan) -> int | None:
    """The next smaller micro-batch that divides a rank's share of a step."""
    share = plan.micro_batch * plan.accumulation
    return max((each for each in range(1, plan.micro_batch) if share % each == 0), default=None)


def _bytes(it: Footprint, world: World) -> int:
    """Of the memory that ran out; on CPU it's all the same."""
    return it.total_bytes - it.nvme_bytes - (0 if world.device.type == "cpu" else it.host_bytes)
