"""What a rank really holds of a model's states after a step, beside what its strategy predicts; on CPU.

Storages are counted, not numbers: padding counts, and what two tensors share counts once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from strategies import _nvme
from strategies import _testing_model as little
from strategies.backends import GlooBackend
from strategies.base import Batch, Footprint, LossTerms, ModelSpec, Plan, Strategy, WorldSpec
from strategies.testing import Workers
from tests.strategies.test_footprint import Uneven, adamw, held

SIZES = (1, 2, 4)
"""Processes; four are two on each of two pretended machines."""
_CONF = Path(__file__).parents[3] / "conf" / "strategy"
CHOICES = tuple(sorted(path.stem for path in _CONF.glob("*.yaml") if path.stem != "auto"))
ALONE, ELASTIC, ON_DISK = "single", "horovod_elastic", "zero_infinity"
_NEEDS = {"DeepSpeedStrategy": "deepspeed", "HorovodStrategy": "horovod", "AccelerateStrategy": "accelerate"}
"""What a strategy's class can't do without."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on one rank."""

    weights: int
    gradients: int
    """Where they are most: as a micro-batch's loss is computed, or after backward."""
    moments: int
    nvme: int
    """Of all these, what lies in files."""
    weights_before_step: int


def why_not(choice: str, size: int) -> str:
    """What keeps a choice from running here on so many processes; empty: nothing."""
    if choice == ELASTIC:
        return "needs horovodrun's elastic mode, and holds what horovod holds"
    if choice == ALONE and size > 1:
        return "is for one process"
    library = _NEEDS.get(type(chosen()[choice]).__name__)
    if library is not None and importlib.util.find_spec(library) is None:
        return f"needs {library}"
    if choice == ON_DISK and _nvme.file_system(tempfile.gettempdir()) == "tmpfs":
        return "needs temporary files on a disk (TMPDIR)"
    return ""


@functools.cache
def chosen() -> dict[str, Strategy]:
    """Each choice of `conf/strategy`."""
    from trainer.config import each_of, register_schemas

    register_schemas()
    found: dict[str, Strategy] = each_of("strategy")
    return found


def states_of(workers: Workers, strategy: Strategy, size: int, accumulation: int = 1) -> tuple[States, Footprint]:
    """Of each kind the most that any rank holds, and what is predicted for each rank."""
    settings = {field.name: getattr(strategy, field.name) for field in fields(strategy) if field.init}
    local_size = size if size < 4 else 2
    answers = workers.run(_on_rank, size, type(strategy), settings, accumulation, local_size=local_size)
    most = {field.name: max(getattr(states, field.name) for states, _ in answers) for field in fields(States)}
    return States(**most), answers[0][1]


def _on_rank(cls: type[Strategy], settings: Mapping[str, Any], accumulation: int) -> tuple[States, Footprint]:
    """In the second step."""
    strategy = cls(**settings)
    world = strategy.connect(GlooBackend(timeout_s=60.0))
    gradients = []

    def loss(outputs: Tensor, batch: Batch) -> LossTerms:
        gradients.append(held([*_gradients(engine)]))
        return little.loss(outputs, batch)

    try:
        plan = Plan(micro_batch=1, accumulation=accumulation)
        # With ZeRO-3 some matrices stay gathered for being small, and one is just that small.
        bare = Uneven(250, (500, 301, 701, 400, 499))
        predicted = strategy.footprint(
            ModelSpec.of(bare), WorldSpec(size=world.size, local_size=world.local_size), plan
        )
        engine, optimizer = strategy.setup(bare, little.weights(False), adamw, plan)
        before_step = 0
        for _ in range(2):
            gradients.clear()
            strategy.forward_backward(engine, [little.make_batch(range(1))] * accumulation, loss, 6.0)
            gradients.append(held([*_gradients(engine)]))
            before_step = held([*_weights(engine)])
            strategy.step(engine, optimizer)
        slots = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        states = States(
            weights=held([*_weights(engine)]),
            gradients=max(gradients),
            moments=held([value for value in slots if value.ndim]),
            nvme=_on_disk(strategy),
            weights_before_step=before_step,
        )
        return states, predicted
    finally:
        strategy.close()


def _weights(engine: Any) -> Iterator[Tensor]:
    yield from (value.data for value in engine.parameters())
    for value in engine.parameters():
        yield from _present(getattr(value, name, None) for name in ("ds_tensor", "ds_secondary_tensor"))
    zero = getattr(engine, "optimizer", None)
    for flats in ("bit16_groups_flat", "param_buffer_of_bit16_for_cpu_offload_groups", *_MASTERS):
        yield from getattr(zero, flats, [])


_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""Stages 1 and 2, and stage 3."""


def _gradients(engine: Any) -> Iterator[Tensor]:
    yield from _present(value.grad for value in engine.parameters())
    zero = getattr(engine, "optimizer", None)
    yield from _present([getattr(zero, "grad_partitions_flat_buffer", None)])
    if getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False):
        yield from _present(flat.grad for flats in _MASTERS for flat in getattr(zero, flats, []))
    for kept in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(zero, kept, {}).values():
            yield from _present(group or ())


def _present(values: Iterable[Tensor | None]) -> Iterator[Tensor]:
    return (value for value in values if value is not None)


def _on_disk(strategy: Any) -> int:
    nvme = getattr(strategy, "_nvme", None)
    files = [] if nvme is None else [rows for group in nvme._groups for rows in group]
    return sum(os.fstat(rows._file.fileno()).st_size for rows in files)
