"""From configuration to objects, in one readable order; nothing after this sees the configuration."""

from __future__ import annotations

import copy
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from strategies.backends import Backend
from strategies.base import Strategy
from strategies.elastic import Elastic, RanksChanged
from strategies.errors import ConfigError, TrainingError
from strategies.precision import Numbers, Precision
from trainer.config import each_of, made, option, resolved
from trainer.doctor.before import examine_first
from trainer.first_import import first_import_of
from trainer.host_memory import keep_freed_memory
from trainer.job import Job
from trainer.liveness import Liveness, is_broken_connection
from trainer.metrics.logs import LOGGER, set_up_logs
from trainer.planner.auto import Auto, Choice
from trainer.pulse import PULSE
from trainer.run_folder import RunFolder, run_name
from trainer.secrets import learn, redacted
from trainer.session import Outcome
from trainer.shortage import Others, OutOfMemoryError, advice, is_shortage, let_go, out_of_memory
from trainer.stop import seconds
from trainer.trainer import Trainer


def train(config: DictConfig, choices: dict[str, str], after: Callable[[Job], None] | None = None) -> Outcome:
    """Build the job of `config` and run it; everything is closed again on the way out.

    Args:
        config: composed and checked (`trainer.config`).
        choices: the option chosen in each group; for the run's name.
        after: called on every rank once a run has come to its end, while all of them can still be talked to.

    Raises:
        ConfigError: something in it is wrong; on every rank.
        TrainingError: the run can't go on.
    """
    config, choices, choice = settled(config, choices)
    plain = resolved(config) | ({} if choice is None else {"auto": [*choice.words]})
    learn(plain)
    parts = parts_of(config, choices)
    trainer, strategy = cast(Trainer, parts["trainer"]), cast(Strategy, parts["strategy"])
    with _beginning_again(strategy.elastic()), _claimed(parts, plain, choices) as folder:
        _set_numerics(parts["precision"], config.deterministic)
        world = strategy.connect(parts["backend"])
        if choice is not None:
            world = replace(world, notes=(*world.notes, *choice.lines))
        if world.device.type == "cpu":
            keep_freed_memory()
        try:
            with world.together(), folder.writing():
                set_up_logs(folder.path, world.rank)
            if config.doctor is not None:
                examine_first(world, folder.path, Path(config.cache))
            job = Job(
                strategy=strategy,
                world=world,
                folder=folder.path,
                model=None if makes_its_own(type(trainer), "model") else parts["model"],
                data=None if makes_its_own(type(trainer), "data") else parts["data"],
                optimizer=parts["optimizer"],
                schedule=parts["schedule"],
                precision=parts["precision"],
                checkpoints=parts["checkpoint"],
                loggers=parts["logger"],
                hooks=parts["hooks"],
                profiler=parts.get("profiler"),
                seed=config.seed,
                resume=config.resume,
                compile=config.compile,
                cache=Path(config.cache),
                config=redacted(plain),
                choices=choices,
                rates=None if choice is None else choice.rates,
            )
            patience_s = seconds(trainer.hang_timeout, "trainer.hang_timeout")
            watch = Liveness(world, folder.path, folder.number, patience_s)
            with watch as liveness, _one_traceback(job, folder, liveness):
                outcome = trainer.fit(job)
                if after is not None and not outcome.stopped:
                    PULSE.finishing("delivering")
                    after(job)
                return outcome
        finally:
            strategy.close()


def settled(config: DictConfig, choices: dict[str, str]) -> tuple[DictConfig, dict[str, str], Choice | None]:
    """The same with a strategy in place of `strategy=auto`, as if that had been given, and what was decided.

    Raises:
        ConfigError: nothing fits, or the job can't be predicted; on every rank.
    """
    if OmegaConf.get_type(config.strategy) is not Auto:
        return config, choices, None
    from trainer.choosing import Undecided, chosen
    from trainer.commands.parts import tokenizer_of

    parts = parts_of(config, choices)
    trainer, data = parts["trainer"], config.data
    overridden = (getattr(type(trainer), name) is not getattr(Trainer, name) for name in ("collate", "loss"))
    choice = chosen(
        Undecided(
            auto=parts["strategy"],
            backend=parts["backend"],
            strategies=functools.cache(lambda: each_of("strategy")),
            optimizer=parts["optimizer"],
            precision=parts["precision"],
            cluster=parts.get("cluster"),
            trainer=trainer,
            model=None if makes_its_own(type(trainer), "model") else parts["model"],
            data=None if makes_its_own(type(trainer), "data") else parts["data"],
            tokenizer=lambda: tokenizer_of(data),
            length=data.get("length"),
            compiled=config.compile,
            cache=Path(config.cache),
            optimizers=lambda: {name: it.slots_per_parameter for name, it in each_of("optimizer").items()},
            clusters=lambda: each_of("cluster"),
            own_batches=any(overridden),
        )
    )
    name = choice.words[0].partition("=")[2]
    config = copy.copy(config)
    with open_dict(config):
        config.strategy = option("strategy", name)
    merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(choice.words[1:])))
    return cast(DictConfig, merged), {**choices, "strategy": name}, choice


def parts_of(config: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """The objects that a composed configuration describes, by group; nothing is touched yet.

    Raises:
        ConfigError: something in it is wrong.
    """
    parts = {str(name): made(config[name]) for name in config if isinstance(config[name], DictConfig)}
    if config.compile:
        cast(Backend, parts["backend"]).refuse_compiling()
    for group in _MAKERS:
        refuse_both(cast(Trainer, parts["trainer"]), group, choices.get(group))
    return parts


@contextmanager
def _claimed(parts: dict[str, Any], plain: dict[str, Any], choices: dict[str, str]) -> Iterator[RunFolder]:
    where = parts["run"]
    cast(Backend, parts["backend"]).meet()
    folder = RunFolder.claim(where.dir, where.name or run_name(plain, choices))
    try:
        yield folder
    finally:
        folder.close()


@contextmanager
def _beginning_again(elastic: Elastic | None) -> Iterator[None]:
    """Around all that may fail for want of another rank."""
    try:
        yield
    except Exception as error:
        _begin_again(elastic, error)
        raise


def _begin_again(elastic: Elastic | None, error: Exception) -> None:
    """Returns where that isn't what to do."""
    if elastic is not None and (isinstance(error, RanksChanged) or is_broken_connection(error)):
        LOGGER.info("begins again", exc_info=True)
        elastic.rejoin(str(error) if isinstance(error, RanksChanged) else "it has lost another rank")


@contextmanager
def _one_traceback(job: Job, folder: RunFolder, liveness: Liveness) -> Iterator[None]:
    """The first rank that fails shows why; the others, who fail for want of it, say only who that was.

    Raises:
        TrainingError: another rank failed first, with something that nobody expected; or it is gone; or memory
            ran out.
    """
    world = job.world
    try:
        yield
    except Exception as error:
        _begin_again(world.elastic, error)
        expected = isinstance(error, (ConfigError, TrainingError)) and not isinstance(error, OutOfMemoryError)
        if not expected:
            LOGGER.exception("failed")
        lost = liveness.lost(error)
        short = error if isinstance(error, OutOfMemoryError) else out_of_memory(error) if is_shortage(error) else None
        mine = lost or f"rank {world.rank}: {_words(error) if short is None else _with_advice(short, job)}"
        first = liveness.first_words(mine)
        if expected:
            raise
        if first == mine:
            if short:
                let_go(error)
            if lost or short:
                raise TrainingError(mine) from error
            raise
        own = re.match(r"rank (\d+): ", first)
        where = f" (all of it in {folder.path / 'logs' / f'rank-{own[1]}.log'})" if own else ""
        raise TrainingError(f"{first}{where}") from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_advice(shortage: OutOfMemoryError, job: Job) -> str:
    with suppress(Exception):  # nothing that goes wrong here is worth more than what happened
        return f"{shortage}. {advice(shortage, job.strategy, job.world, _others())}"
    return f"{shortage}. Take fewer samples at a time, or a lower precision (trainer.micro_batch, precision)."


def _others() -> Others:
    """Every strategy and optimizer, each with its defaults."""
    slots = {name: it.slots_per_parameter for name, it in each_of("optimizer").items()}
    return Others(strategies=each_of("strategy"), slots=slots)


_MAKERS = {"model": "make_model", "data": "make_data"}


def makes_its_own(trainer_class: type[Trainer], group: str) -> bool:
    """Whether a Trainer subclass makes what the group `model` or `data` would."""
    return getattr(trainer_class, _MAKERS[group]) is not getattr(Trainer, _MAKERS[group])


def refuse_both(trainer: Trainer, group: str, choice: str | None) -> None:
    """A Trainer that makes its own model or data, and a configuration that chooses another.

    Raises:
        ConfigError: both, or neither.
    """
    name, method = type(trainer).__name__, _MAKERS[group]
    if makes_its_own(type(trainer), group) and choice not in (None, "own"):
        raise ConfigError(
            f"{name}: {group}={choice} was chosen, but this Trainer makes its own ({method}). "
            f"Leave {group} out ({group})."
        )
    if not makes_its_own(type(trainer), group) and choice == "own":
        raise ConfigError(
            f"{name}: {group}=own needs a Trainer that overrides {method}(), and this one doesn't. "
            f"Choose another {group} ({group})."
        )


def _set_numerics(precision: Precision, deterministic: bool) -> None:
    """Process-wide switches of torch; each is set, so that an earlier job in this process leaves nothing behind."""
    torch.backends.cuda.matmul.allow_tf32 = precision.numbers is Numbers.tf32
    torch.backends.cudnn.allow_tf32 = precision.numbers is Numbers.tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with first_import_of("torch._inductor"):
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.benchmark = False
