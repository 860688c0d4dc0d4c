"""`strategy=auto` before anything is connected: every rank says what it sees, rank 0 decides, and all do the same."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies.backends import Backend, connect_ranks, disconnect_ranks
from strategies.base import ModelSpec, Strategy
from strategies.ec2 import instance_type
from strategies.errors import ConfigError
from strategies.precision import Precision
from strategies.world import Launch, World, agree, exchange, open_store, publish
from trainer.assembly import share_of
from trainer.data.base import AbstractData, Tokenizer
from trainer.instances import instances
from trainer.metrics.memory import host_memory
from trainer.metrics.throughput import peak_flops
from trainer.models.base import AbstractModel
from trainer.optim import AbstractOptimizer
from trainer.place import at_home
from trainer.planner import advice
from trainer.planner.auto import (
    Auto,
    Choice,
    Seen,
    choose,
    chosen_words,
    machines_of,
    none_fits,
    one_machine,
    said,
)
from trainer.planner.beside import forget_tensors_without_storage
from trainer.planner.calibrate import Calibration
from trainer.planner.cluster import Cluster
from trainer.planner.facts import ModelFacts, facts_of
from trainer.planner.search import Candidate, Wanted
from trainer.planner.this import own_rates
from trainer.planner.work import Rates

_LINK_BYTES = 1 << 23
_LINK_TURNS = 4


@dataclass(frozen=True, kw_only=True)
class Undecided:
    """A job whose strategy is still to be chosen."""

    auto: Auto
    backend: Backend
    strategies: Callable[[], Mapping[str, Strategy]]
    """All that there are, by name; takes a moment."""
    optimizer: AbstractOptimizer
    precision: Precision
    cluster: Cluster | None
    trainer: Any
    """A fresh one, which is thrown away."""
    model: AbstractModel | None
    """A fresh one, not prepared; None: the Trainer subclass makes its own."""
    data: AbstractData | None
    """None: the Trainer subclass makes its own."""
    tokenizer: Callable[[], Tokenizer | None]
    length: int | None
    """Tokens of a sample, as the data cuts them."""
    compiled: bool
    cache: Path
    optimizers: Callable[[], Mapping[str, float]]
    """Choice -> moments that it keeps of each trained number; for advice."""
    clusters: Callable[[], Mapping[str, Cluster]]
    own_batches: bool = False
    """The Trainer subclass makes batches or the loss in its own way."""


def chosen(job: Undecided) -> Choice:
    """The same choice on every rank of this launch, made by rank 0. Needs no process group.

    Raises:
        ConfigError: nothing fits, no strategy can run here, or the model can't be predicted; on every rank.
    """
    job.backend.meet()
    launch = Launch.from_env()
    store = open_store(launch)
    occasion = f"auto/{store.add(f'auto/of/{launch.rank}', 1)}"
    mine, error = "", None
    try:
        mine = json.dumps(asdict(_look(job, launch)))
    except ConfigError as caught:
        error = caught
    agree(store, launch, f"{occasion}/looked", error)
    seen = [Seen(**json.loads(each)) for each in exchange(store, launch, f"{occasion}/seen", mine)]
    link = _link(job, launch) if _needs_link(job, launch) else None
    kept: list[Choice] = []

    def decide() -> str:
        kept.append(_decided(job, launch, seen, link))
        return json.dumps([*kept[0].words])

    try:
        words = json.loads(publish(store, launch, f"{occasion}/choice", decide))
    finally:
        if launch.rank == 0:
            forget_tensors_without_storage()
    return kept[0] if kept else Choice(words=words, lines=())


def _look(job: Undecided, launch: Launch) -> Seen:
    """What this rank finds; rates that no table has are measured by all ranks at once, as they will compute."""
    device = job.backend.device(launch)
    job.precision.check(device)
    free, _ = host_memory()
    memory, name = free / launch.local_size, "cpu"
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), float(torch.cuda.mem_get_info(device)[0])
    flops = copied = None
    if peak_flops(device, job.precision.numbers) is None and (job.cluster is None or job.cluster.measure):
        flops, copied = own_rates(device, job.precision.numbers)
    return Seen(
        device=name,
        memory_bytes=memory,
        host_memory_bytes=free,
        disk_bytes=float(shutil.disk_usage(Path.cwd()).free),
        flops=flops,
        copied_bytes_per_s=copied,
        refused=_missing(job) if launch.local_rank == 0 else {},
    )


def _missing(job: Undecided) -> dict[str, str]:
    """Strategies whose libraries this machine lacks, and which."""
    strategies = job.strategies()
    lacks = {
        name: [library for library in strategies[name].libraries if importlib.util.find_spec(library) is None]
        for name in job.auto.chosen_from(strategies)
    }
    return {name: f"{', '.join(libraries)} isn't installed" for name, libraries in lacks.items() if libraries}


def _needs_link(job: Undecided, launch: Launch) -> bool:
    """Whether the rate between ranks is to be measured; equal on every rank."""
    own = job.cluster is None or (job.cluster.measure and job.cluster.link_gb_per_s is None)
    return own and launch.size > 1 and launch.on_one_machine and _instance() is None


def _instance() -> str | None:
    """EC2's type of this machine, if its numbers are known."""
    found = instance_type()
    return found if found in instances() else None


def _link(job: Undecided, launch: Launch) -> float:
    """Bytes per second that a rank sends in an all-reduce over this launch's own backend. Collective."""
    world = connect_ranks(job.backend)
    try:
        tensor = torch.ones(_LINK_BYTES // 4, device=world.device)
        dist.all_reduce(tensor)
        best = float("inf")
        for _ in range(_LINK_TURNS):
            world.barrier()
            begun = _now(world.device)
            dist.all_reduce(tensor)
            best = min(best, _now(world.device) - begun)
    finally:
        disconnect_ranks()
    return 2 * (launch.size - 1) / launch.size * _LINK_BYTES / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _decided(job: Undecided, launch: Launch, seen: list[Seen], link: float | None) -> Choice:
    """On rank 0."""
    share_of(job.trainer.global_batch, launch.size)
    numbers = job.precision.numbers
    machines = machines_of(
        job.cluster,
        seen,
        instance=_instance(),
        size=launch.size,
        local_size=launch.local_size,
        link=link,
        numbers=numbers,
    )
    factors = Rates.published(machines, numbers).factors
    if job.trainer.calibration is not None:
        factors = Calibration.read(at_home(job.trainer.calibration)).applied(factors, numbers)
    facts = _facts(job, "cpu" if machines.device == "cpu" else "cuda")
    _refuse_untraceable(facts, job)
    refused = dict(entry for each in seen for entry in each.refused.items())
    strategies = {name: it for name, it in job.strategies().items() if name in job.auto.chosen_from(job.strategies())}
    own = job.trainer.recomputing is not None
    best: Candidate | None = None
    while best is None:
        wanted = Wanted(
            facts=facts,
            strategies={name: it for name, it in strategies.items() if name not in refused},
            checkpointing={job.trainer.activation_checkpointing.name: job.trainer.recomputing},
            global_batch=job.trainer.global_batch,
            micro_batch=job.trainer.micro_batch,
            clip_norm=job.trainer.clip_norm,
            compiled=job.compiled,
        )
        best, others, cannot = choose(
            wanted,
            machines,
            factors,
            with_nvme=bool(job.auto.among),
            elementwise=job.optimizer.elementwise or launch.size == 1,
            own_checkpointing=own,
        )
        if best is None:
            changes = advice.found(wanted, machines, factors, optimizers=job.optimizers(), clusters=job.clusters())
            raise none_fits(others, [str(change) for change in changes], refused | cannot)
        name = best.strategy.split()[0]
        try:  # only now, since it may import a library
            strategies[name].refuse_job(job.backend, launch, best.plan, facts.spec)
        except ConfigError as error:
            best, refused[name] = None, str(error)
    words = chosen_words(best, wanted, own_checkpointing=own)
    lines = said(best, others, words)
    if (alone := one_machine(wanted, machines, factors, best)) is not None:
        lines.append(alone)
    return Choice(words=words, lines=lines, rates=Rates(machines=machines, factors=factors))


def _facts(job: Undecided, device: str) -> ModelFacts:
    """Of the model on the meta device, with a sample as the job's own data has it where only that can say it.

    Raises:
        ConfigError: the model can't be made without storage, or there is no sample to predict from.
    """
    trainer, slots = job.trainer, job.optimizer.slots_per_parameter
    tokenizer = job.tokenizer()
    if job.model is not None:
        job.model.prepare(tokenizer)
        trainer.task = job.model.task()
    if job.model is not None and job.data is not None and not job.own_batches:
        longest = job.model.positions
        length = job.length or longest or 512
        return facts_of(
            job.model, slots, job.precision, length=min(length, longest) if longest else length, device=device
        )
    name = type(trainer).__name__
    fix = "Make its tensors on the current default device, and read none of their values"
    with _in_one_line(f"{name}.make_model", "the model can't be made without storage", fix), torch.device("meta"):
        module = trainer.make_model() if job.model is None else job.model.make()
    with _in_one_line(f"{name}.make_data or collate", "there is no sample", "Mend it"):
        sample = _sample(job)
        trainer.collate([sample] * 2, [0, 1])
    return ModelFacts(
        module=module,
        batch=lambda samples: trainer.collate([sample] * samples, list(range(samples))),
        loss=trainer.loss,
        spec=ModelSpec.of(module, slots_per_parameter=slots),
        precision=job.precision,
        device=device,
    )


def _refuse_untraceable(facts: ModelFacts, job: Undecided) -> None:
    try:
        facts.trace(job.trainer.micro_batch or 1, job.trainer.recomputing)
    except ConfigError as error:
        why = str(error.__cause__ or error).strip() or type(error.__cause__).__name__
        raise ConfigError(
            f"strategy=auto: {type(facts.module).__name__} or its loss can't run without storage: "
            f"{why.splitlines()[0].rstrip('.')[:200]}. Read no values in them (.item(), `if` of a tensor), or name a "
            "strategy, such as strategy=ddp (strategy)."
        ) from error


def _sample(job: Undecided) -> Any:
    """The first one of the training data. What is slow about reading it lies in the cache for the run itself."""
    if job.data is None:
        return job.trainer.make_data().train[0]
    alone = World(device=torch.device("cpu"), store=dist.HashStore())
    return job.data.build(alone, at_home(job.cache), lambda text: None).train[0]


@contextlib.contextmanager
def _in_one_line(where: str, what: str, fix: str) -> Iterator[None]:
    """Around a user's own code.

    Raises:
        ConfigError: it has raised something.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"strategy=auto: {where}: {what}: {first[:200]}. {fix}, or name a strategy, such as strategy=ddp "
            "(strategy)."
        ) from error
