"""What the workers run for the contract, and what they tell of it."""

from __future__ import annotations

import gc
import hashlib
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies._testing_model import (
    GLOBAL_BATCH,
    Job,
    Recipe,
    TinyModel,
    fill_from_whole,
    loss,
    loss_with_auxiliary,
    make_batch,
    make_model,
    make_optimizer,
    weights,
)
from strategies.backends import GlooBackend
from strategies.base import Batch, LossSum, Plan, State
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from strategies.world import Launch, World


@dataclass(kw_only=True)
class Snapshot:
    """A `State` whose tensors are whole and on CPU: what travels from one world to another."""

    weights: dict[str, Tensor]
    optim: dict[str, Tensor]
    scaler: dict[str, float]
    aliases: dict[str, str]


@dataclass(kw_only=True)
class Record:
    """What a run showed on one rank."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    full: dict[str, Tensor] = field(default_factory=dict)
    """`full_state_dict` at the end."""
    snapshot: Snapshot
    """`state` at the end; on rank 0 alone, to save the pipes."""
    digest: str = ""
    """Of the snapshot's values: equal on all ranks."""
    data_size: int = 1


class Rig:
    """A connected strategy with the little model in one worker."""

    def __init__(self, recipe: type[Recipe], job: Job) -> None:
        self.strategy = recipe().make(unused=job.unused)
        self.world: World = self.strategy.connect(recipe().backend())
        self.set_up(job)

    def set_up(self, job: Job) -> None:
        """Another model and optimizer on the same connection."""
        self.job = job
        plan = job.plan(self.world.data_size)
        with self.strategy.init_context(plan):
            if job.on_meta:
                with torch.device("meta"):
                    bare: nn.Module = TinyModel(job.unused)
            else:
                bare = make_model(job.unused)
        self.model, self.optimizer = self.strategy.setup(
            bare, weights(job.unused), lambda named: make_optimizer(job, named), plan
        )

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a global batch."""
        job, world = self.job, self.world
        micro = job.plan(world.data_size).micro_batch
        start = step * GLOBAL_BATCH + world.data_rank * job.accumulation * micro
        return [
            make_batch(range(first, first + micro), step in job.poisoned).to(world.device)
            for first in range(start, start + job.accumulation * micro, micro)
        ]

    def train(self, record: Record) -> None:
        """The job's steps, as a trainer would take them."""
        for step in self.job.steps:
            batches = self.batches(step)
            (total,) = self.world.reduce([sum(batch.num_targets for batch in batches)])
            function = loss_with_auxiliary if self.job.auxiliary else loss
            sums = self.strategy.forward_backward(self.model, batches, function, total)
            info = self.strategy.step(self.model, self.optimizer)
            record.losses.append(self.mean(sums, total))
            record.norms.append(float(info.grad_norm))
            record.skipped.append(bool(info.skipped))
            if self.job.evaluate_between:
                record.evaluations.append(self.evaluate(step + 100))

    def evaluate(self, step: int) -> float:
        """Mean loss of a global batch; the last rank has run out of samples."""
        batches = self.batches(step)
        if self.world.data_size > 1 and self.world.data_rank == self.world.data_size - 1:
            batches = [batch.weightless() for batch in batches]
        (total,) = self.world.reduce([sum(batch.num_targets for batch in batches)])
        sums = [self.strategy.evaluate(self.model, batch, loss) for batch in batches]
        (value,) = self.world.reduce([sum(float(each.loss) for each in sums)])
        (seen,) = self.world.reduce([sum(each.num_targets for each in sums)])
        assert seen == total, f"{seen} counted positions were evaluated, not {total}"
        return value / total

    def mean(self, sums: LossSum, total: float) -> float:
        """Over the counted positions of the global batch."""
        value, seen = self.world.reduce([float(sums.loss), sums.num_targets])
        assert seen == total, f"the losses cover {seen} counted positions, not {total}"
        return value / total

    def finish(self, record: Record) -> Record:
        """Take the state, and close."""
        record.full = self.strategy.full_state_dict(self.model)
        record.snapshot = self.snapshot()
        record.digest = digest(record.snapshot)
        record.data_size = self.world.data_size
        if self.world.rank != 0:
            record.snapshot = empty_snapshot()
        self.strategy.close()
        return record

    def snapshot(self) -> Snapshot:
        """The strategy's state with whole tensors, on every rank."""
        return whole(self.strategy.state(self.model, self.optimizer))

    def restore(self, snapshot: Snapshot) -> None:
        """Into the template, and from there into the strategy: the way of a checkpoint."""
        template = self.strategy.state_template(self.model, self.optimizer)
        for mine, theirs in ((template.weights, snapshot.weights), (template.optim, snapshot.optim)):
            assert mine.keys() == theirs.keys(), f"template and state differ: {sorted(mine.keys() ^ theirs.keys())}"
            for name, tensor in mine.items():
                fill_from_whole(tensor, theirs[name])
        template.scaler = dict(snapshot.scaler)
        self.strategy.load_state(self.model, self.optimizer, template)


def whole(state: State) -> Snapshot:
    """Whole tensors from `state`, copied to CPU. Collective where it is sharded."""
    return Snapshot(
        weights={name: _whole_tensor(value) for name, value in state.weights.items()},
        optim={name: _whole_tensor(value) for name, value in state.optim.items()},
        scaler=dict(state.scaler),
        aliases=dict(state.aliases),
    )


def _whole_tensor(value: Tensor) -> Tensor:
    gather = getattr(value, "full_tensor", None)
    return (value if gather is None else gather()).detach().cpu().clone()


def empty_snapshot() -> Snapshot:
    """Nothing."""
    return Snapshot(weights={}, optim={}, scaler={}, aliases={})


def digest(snapshot: Snapshot) -> str:
    """A checksum of every value."""
    summed = hashlib.sha256()
    for name, value in sorted({**snapshot.weights, **snapshot.optim}.items()):
        summed.update(name.encode())
        summed.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return summed.hexdigest()


# What the workers run.


def train_job(recipe: type[Recipe], job: Job, start: Snapshot | None = None) -> Record:
    """Train, perhaps from a state, and tell everything."""
    rig = Rig(recipe, job)
    if start is not None:
        rig.restore(start)
    record = Record(snapshot=empty_snapshot())
    rig.train(record)
    return rig.finish(record)


def reference_job(job: Job) -> Record:
    """The same by plain torch: one process, one batch, no strategy. Poisoned steps are left out."""
    dtype = Precision(numbers=Numbers[job.numbers]).master_dtype
    model = make_model(job.unused).to(dtype)
    optimizer = make_optimizer(job, [(n, p) for n, p in model.named_parameters() if p.requires_grad])
    record = Record(snapshot=empty_snapshot())
    for step in job.steps:
        if step in job.poisoned:
            continue
        batch = make_batch(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        terms = (loss_with_auxiliary if job.auxiliary else loss)(model.train()(**batch.inputs), batch)
        mean = terms.loss / batch.num_targets
        (mean if terms.auxiliary is None else mean + terms.auxiliary).backward()  # type: ignore[no-untyped-call]
        limit = float("inf") if job.clip_norm is None else job.clip_norm
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], limit)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(float(mean.detach()))
        record.norms.append(float(norm))
        record.skipped.append(False)
    record.full = {name: value.detach().clone() for name, value in model.state_dict().items()}
    record.snapshot = _reference_snapshot(model, optimizer)
    return record


def _reference_snapshot(model: TinyModel, optimizer: Optimizer) -> Snapshot:
    stored = model.state_dict()
    names = {name for name, _ in model.named_parameters()} | {"shift"}
    return Snapshot(
        weights={name: stored[name].clone() for name in names},
        optim=dict(_reference_moments(model, optimizer)),
        scaler={},
        aliases={"head.weight": "embedding.weight"},
    )


def _reference_moments(model: TinyModel, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    slots = {slot for state in optimizer.state.values() for slot, value in state.items() if value is not None}
    for name, parameter in model.named_parameters():
        for slot in slots if parameter.requires_grad else ():
            value = optimizer.state.get(parameter, {}).get(slot)
            if value is None:
                value = torch.zeros(()) if slot == "step" else torch.zeros_like(parameter)
            yield f"{name}/{slot}", value.detach().clone()


@dataclass(kw_only=True)
class Fresh:
    """What a strategy says of itself before the first step."""

    state: Snapshot
    template: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype by name, weights and moments together."""
    after: Record
    """Of a job that took the fresh state up again and went on."""
    weights_kept: bool
    """Making a template changed no weight."""


def fresh_job(recipe: type[Recipe], job: Job) -> Fresh:
    """State and template before the first step; then load that state, and train."""
    rig = Rig(recipe, job)
    before = rig.snapshot()
    template = rig.strategy.state_template(rig.model, rig.optimizer)
    described = {
        name: (tuple(value.shape), str(value.dtype)) for name, value in {**template.weights, **template.optim}.items()
    }
    kept = digest(rig.snapshot()) == digest(before)
    rig.restore(before)
    record = Record(snapshot=empty_snapshot())
    rig.train(record)
    return Fresh(state=before, template=described, after=rig.finish(record), weights_kept=kept)


def poisoned_job(recipe: type[Recipe], job: Job) -> tuple[Record, bool]:
    """Train with poisoned steps; also whether each of them left every weight and moment as it was."""
    rig = Rig(recipe, job)
    record = Record(snapshot=empty_snapshot())
    unchanged = True
    for step in job.steps:
        before = digest(rig.snapshot()) if step in job.poisoned else ""
        rig.job = job.over((step,))
        rig.train(record)
        if step in job.poisoned:
            unchanged = unchanged and digest(rig.snapshot()) == before
    return rig.finish(record), unchanged


def predict_job(recipe: type[Recipe], job: Job) -> tuple[int, list[Tensor], bool]:
    """Outputs for this rank's micro-batches of step 0, after training; and whether they carry a graph."""
    rig = Rig(recipe, job)
    rig.train(Record(snapshot=empty_snapshot()))
    outputs = [rig.strategy.predict(rig.model, batch) for batch in rig.batches(0)]
    rank = rig.world.data_rank
    rig.strategy.close()
    return rank, [each.detach().cpu() for each in outputs], any(each.requires_grad for each in outputs)


def reference_predictions(job: Job) -> Tensor:
    """Outputs [GLOBAL_BATCH, ...] of the bare model after the same training."""
    model = make_model(job.unused).to(Precision(numbers=Numbers[job.numbers]).master_dtype).eval()
    model.load_state_dict(reference_job(job).full)
    with torch.no_grad():
        outputs: Tensor = model(**make_batch(range(GLOBAL_BATCH)).inputs)
    return outputs


def reference_evaluation(full: dict[str, Tensor], step: int, data_size: int) -> float:
    """The mean loss that `Rig.evaluate` should give for these weights."""
    model = make_model("spare" in full).to(full["embedding.weight"].dtype).eval()
    model.load_state_dict(full)
    end = GLOBAL_BATCH - (GLOBAL_BATCH // data_size if data_size > 1 else 0)
    batch = make_batch(range(step * GLOBAL_BATCH, step * GLOBAL_BATCH + end))
    with torch.no_grad():
        return float(loss(model(**batch.inputs), batch).loss) / batch.num_targets


def communication_job(recipe: type[Recipe], job: Job, late_s: float) -> list[tuple[float | None, float | None, float]]:
    """Of each step its exposed and its whole communication, and how long it took; the last rank is late in the last."""
    rig, found = Rig(recipe, job), []
    for step in job.steps:
        batches = rig.batches(step)
        (total,) = rig.world.reduce([sum(batch.num_targets for batch in batches)])
        begin = time.perf_counter()
        if step == job.steps[-1] and rig.world.rank == rig.world.size - 1:
            time.sleep(late_s)
        rig.strategy.forward_backward(rig.model, batches, loss, total)
        info = rig.strategy.step(rig.model, rig.optimizer)
        found.append((info.communication_s, info.communication_total_s, time.perf_counter() - begin))
    rig.strategy.close()
    return found


def try_out_job(recipe: type[Recipe], job: Job, everybody: bool) -> Record:
    """Fewer micro-batches than planned, on one rank or on all; then set up again, and train."""
    rig = Rig(recipe, job)
    if everybody or rig.world.rank == rig.world.size - 1:
        rig.strategy.forward_backward(rig.model, rig.batches(0)[:-1], loss, 10.0)
        rig.strategy.forward_backward(rig.model, rig.batches(1)[:-1], loss, 10.0)
    rig.world.barrier()
    rig.set_up(job)
    record = Record(snapshot=empty_snapshot())
    rig.train(record)
    return rig.finish(record)


def set_up_twice_job(recipe: type[Recipe], first: Job, second: Job) -> list[Record]:
    """Two runs over one connection."""
    rig = Rig(recipe, first)
    one, two = (Record(snapshot=empty_snapshot()) for _ in range(2))
    rig.train(one)
    rig.set_up(second)
    rig.train(two)
    return [one, rig.finish(two)]


def connect_again_job(recipe: type[Recipe], job: Job) -> tuple[str, Record]:
    """Train, close twice, and do it all once more; the first value says what stayed behind, if anything did."""
    rig = Rig(recipe, job)
    rig.train(Record(snapshot=empty_snapshot()))
    rig.strategy.close()
    rig.strategy.close()
    model, left = weakref.ref(rig.model), ""
    del rig
    gc.collect()
    if torch.distributed.is_initialized():
        left = "a process group"
    elif model() is not None:
        left = "the model"
    return left, train_job(recipe, job) if not left else Record(snapshot=empty_snapshot())


@dataclass(kw_only=True)
class MissingDeviceBackend(GlooBackend):
    """One rank's machine lacks the device."""

    lame: int = 0

    def device(self, launch: Launch) -> torch.device:
        """Not here."""
        if launch.rank == self.lame:
            raise ConfigError(f"MissingDeviceBackend: rank {launch.rank} has no device. Choose another (backend).")
        return torch.device("cpu")


def missing_device_job(recipe: type[Recipe], lame: int) -> tuple[str, bool]:
    """What each rank hears when one lacks its device, and whether it started to communicate."""
    strategy = recipe().make()
    try:
        strategy.connect(MissingDeviceBackend(timeout_s=20.0, lame=lame))
    except ConfigError as error:
        started = torch.distributed.is_initialized()
        strategy.close()
        return str(error), started
    return "", True


def refused_plan_job(recipe: type[Recipe]) -> str:
    """What each rank hears of a precision that a CPU can't honour."""
    strategy = recipe().make()
    strategy.connect(recipe().backend())
    plan = Plan(micro_batch=1, precision=Precision(numbers=Numbers.tf32))
    try:
        with strategy.init_context(plan):
            bare = make_model(False)
        strategy.setup(bare, weights(False), lambda named: make_optimizer(Job(), named), plan)
    except ConfigError as error:
        strategy.close()
        return str(error)
    return ""


def refused_state_job(recipe: type[Recipe], job: Job, problem: str) -> str:
    """What each rank hears of a state that isn't this model's."""
    rig = Rig(recipe, job)
    state = rig.strategy.state_template(rig.model, rig.optimizer)
    if problem == "missing":
        del state.weights["up.weight"]
    elif problem == "unknown":
        state.weights["another"] = torch.zeros(2)
    elif problem == "moment":
        state.optim.pop(next(iter(sorted(state.optim))))
    else:
        state.weights["up.bias"] = torch.zeros(99)
    try:
        rig.strategy.load_state(rig.model, rig.optimizer, state)
    except ConfigError as error:
        rig.strategy.close()
        return str(error)
    return ""


def refused_size_job(recipe: type[Recipe]) -> tuple[str, bool]:
    """What each rank hears at a world size that the strategy doesn't know."""
    strategy = recipe().make()
    try:
        strategy.connect(recipe().backend())
    except ConfigError as error:
        started = torch.distributed.is_initialized()
        strategy.close()
        return str(error), started
    return "", True


def snapshot_is_a_copy_job(recipe: type[Recipe], job: Job) -> bool:
    """Whether `full_state_dict` stays as it was while training goes on."""
    rig = Rig(recipe, job)
    full = rig.strategy.full_state_dict(rig.model)
    before = {name: value.clone() for name, value in full.items()}
    rig.train(Record(snapshot=empty_snapshot()))
    rig.strategy.close()
    return all(torch.equal(full[name], before[name]) for name in before)
