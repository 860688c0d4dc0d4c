"""Read in a checkpoint of DeepSpeed's or Accelerate's own, so that a run goes on here from its middle."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands import Parser

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.checkpoint import Record
    from trainer.imports import Source
    from trainer.trainer import Trainer


def parser() -> Parser:
    """`shardwright import-checkpoint`'s own options."""
    found = Parser(
        "import-checkpoint",
        "Read in a checkpoint that DeepSpeed (ZeRO 1, 2, 3, or stage 0) or Accelerate (DDP, or FSDP with sharded or "
        "full state) wrote: weights, moments and step. Afterwards `shardwright train` with the same words goes on from "
        "there, under any strategy and on any number of ranks. Neither library is needed, and no code in the files is "
        "run. One process does it; it holds one tensor at a time.",
    )
    found.add_argument(
        "source",
        type=Path,
        help="the folder given to DeepSpeed's save_checkpoint (or one of its steps), or to save_state",
    )
    found.add_argument(
        "keys", nargs="*", metavar="key=value", help="as for shardwright train: run.dir=... model=... optimizer=... ..."
    )
    found.add_argument(
        "--trainer",
        metavar="FILE.py:CLASS",
        help="a Trainer of your own, in its script; give the words of its run() too",
    )
    found.add_argument("--step", type=int, metavar="N", help="optimizer steps taken; default: what the checkpoint says")
    found.add_argument(
        "--samples-seen", type=int, metavar="N", help="the data position; default: what the checkpoint says, or step x "
        "trainer.global_batch",
    )  # fmt: skip
    found.add_argument(
        "--weights-only", action="store_true", help="begin with fresh moments, such as those of another optimizer"
    )
    found.add_argument(
        "--names", type=Path, metavar="FILE.json", help="parameter names of each group of an optimizer that numbers "
        "them: a list of lists, in its order; needed where the shapes don't say it",
    )  # fmt: skip
    found.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="full name of a class in the files that may be left out",
    )
    return found


def main(options: Namespace) -> int:
    """Writes the run's first checkpoint; prints what it holds, and what it can't hold."""
    from strategies.errors import ConfigError
    from strategies.world import Launch

    if Launch.from_env().size > 1:
        raise ConfigError("import: one process does it. Start it without torchrun.")
    for flag, value in (("--step", options.step), ("--samples-seen", options.samples_seen)):
        if value is not None and value < 0:
            raise ConfigError(f"import: {flag}={value} is negative. Give a number from 0 ({flag}).")
    from trainer.host_memory import give_back_freed_memory
    from trainer.imports import open_source

    give_back_freed_memory()
    job = _job(options.keys, options.trainer)
    source = open_source(options.source, options.ignore)
    if options.weights_only:
        source.forget_moments()
    names = None if options.names is None else _names(options.names)
    _write(job, source, names, options)
    return 0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the words amount to."""

    config: Any
    plain: dict[str, Any]
    choices: dict[str, str]
    trainer: Trainer
    model: nn.Module
    """On the meta device, unless a Trainer of one's own makes it."""


def _job(words: Sequence[str], place: str | None) -> _Job:
    from trainer.build import makes_its_own, refuse_both
    from trainer.config import composed, made, resolved
    from trainer.secrets import learn
    from trainer.trainer import Trainer

    cls = Trainer if place is None else _trainer_class(place)
    own = [f"{group}=own" for group in ("model", "data") if makes_its_own(cls, group)]
    config, choices = composed([*own, *words], cls)
    plain = resolved(config)
    learn(plain)
    trainer = made(config.trainer)
    refuse_both(trainer, "model", choices.get("model"))
    return _Job(config=config, plain=plain, choices=choices, trainer=trainer, model=_model(config, trainer))


def _model(config: Any, trainer: Trainer) -> nn.Module:
    import torch

    from trainer.build import makes_its_own
    from trainer.commands.parts import tokenizer_of
    from trainer.config import made

    if makes_its_own(type(trainer), "model"):
        module = trainer.make_model()
    else:
        model = made(config.model)
        model.prepare(tokenizer_of(config.data))
        with torch.device("meta"):
            module = model.make()
    return module.double() if made(config.precision).master_dtype is torch.float64 else module


def _trainer_class(place: str) -> type[Trainer]:
    """A Trainer from its script, which is run as far as importing it does.

    Raises:
        ConfigError: there is no such file, or no such class in it.
    """
    from strategies.errors import ConfigError, nearest
    from trainer.trainer import Trainer

    file, _, name = place.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"import: --trainer={place} names no Python file. Give FILE.py:CLASS (--trainer).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent.absolute()))
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Trainer)):
        known = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Trainer)]
        raise ConfigError(f"import: {path} has no Trainer {name!r}. {nearest(name, known)} (--trainer)")
    return found


def _names(path: Path) -> list[list[str]]:
    from strategies.errors import ConfigError

    try:
        found = json.loads(path.read_text())
        assert isinstance(found, list)
        assert all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in found)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"import: {path} is no JSON list with a list of names for each group: {error} (--names)."
        ) from error
    return found


def _write(job: _Job, source: Source, names: list[list[str]] | None, options: Namespace) -> None:
    from strategies.errors import ConfigError, TrainingError
    from trainer.checkpoint.manifest import folder_of
    from trainer.config import made
    from trainer.data.cache import Report
    from trainer.imports import Target
    from trainer.run_folder import RunFolder, run_name

    target = Target.of(job.model, made(job.config.optimizer))
    report = Report(
        "Reading (MiB)", -(-target.num_bytes // 2**20), lambda line: print(line, file=sys.stderr), shown=True
    )
    tensors, fresh = target.fill(source, names, _in_mib(report))
    record = _record(job, source, target.aliases, options)
    where = job.plain["run"]
    folder = RunFolder.claim(where["dir"], where["name"] or run_name(job.plain, job.choices))
    try:
        address = job.plain["checkpoint"]["folder"] or str(folder.path / "checkpoints")
        _refuse_used(folder.path, address)
        with report:
            _save(address, tensors, record)
    except TrainingError as error:  # what was read, not where it was written
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        raise
    finally:
        folder.close()
    step, samples = int(record.progress["step"]), int(record.progress["samples"])
    print(f"read: {source.what}, written by {source.ranks} ranks: {source.where}")
    print(f"written: {address}/{folder_of(step)}: {_held(len(target.weights), len(target.moments), fresh)}")
    print(
        f"the data goes on after {samples:,} samples of this run's own order, which isn't that of the other loader; "
        "random streams (dropout) begin anew; the learning rate is what this run's schedule says at that step"
    )
    print(f"go on: the same words with shardwright train, run.dir={folder.path}")


def _in_mib(report: Any) -> Any:
    done = [0, 0]

    def tick(num_bytes: int) -> None:
        done[0] += num_bytes
        if whole := done[0] // 2**20 - done[1]:
            done[1] += whole
            report.advance(whole)

    return tick


def _held(num_weights: int, num_moments: int, fresh: list[str]) -> str:
    if num_moments and len(fresh) == num_moments:
        return f"{num_weights} weights; no moments, so they begin at zero as in a fresh optimizer"
    zero = f" ({len(fresh)} had none and begin at zero, the first is {fresh[0]})" if fresh else ""
    return f"{num_weights} weights, and the moments of {num_moments}{zero}"


def _record(job: _Job, source: Source, aliases: dict[str, str], options: Namespace) -> Record:
    """Where the run stands, and what it is."""
    from strategies.errors import ConfigError
    from trainer.checkpoint import Record
    from trainer.progress import Progress
    from trainer.secrets import redacted

    step = next((n for n in (options.step, source.step, source.updates()) if n is not None), None)
    if step is None:
        raise ConfigError(f"import: {source.where} doesn't say how many steps were taken. Say it: --step N (--step).")
    samples = next(n for n in (options.samples_seen, source.samples, step * job.trainer.global_batch) if n is not None)
    return Record(
        progress=Progress(step=step, samples=samples).to_json(),
        world_size=source.ranks,
        scaler=source.scaler,
        aliases=aliases,
        config=redacted(job.plain),
        choices=job.choices,
    )


def _refuse_used(folder: Path, address: str) -> None:
    """Nothing is overwritten, and two histories don't become one."""
    from strategies.errors import ConfigError
    from trainer.checkpoint.manifest import NAME, step_of
    from trainer.checkpoint.store import open_store

    held = sorted(
        name for name in open_store(address).sizes() if name.endswith(f"/{NAME}") and step_of(name) is not None
    )
    used = f"{address}/{held[-1].partition('/')[0]}" if held else None
    if (folder / "metrics.jsonl").exists():
        used = used or str(folder / "metrics.jsonl")
    if used is not None:
        raise ConfigError(f"import: there is {used} already, from a run. Choose a new folder (run.dir).")


def _save(address: str, tensors: dict[str, Tensor], record: Record) -> None:
    import torch

    from strategies.world import Launch, World, open_store
    from trainer.checkpoint import Checkpointer, Checkpoints

    world = World(device=torch.device("cpu"), store=open_store(Launch()))
    files = Checkpointer(address, world, Checkpoints(keep=0))
    files.save(tensors, {}, record)
