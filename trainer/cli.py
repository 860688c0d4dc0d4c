"""The commands: `shardwright train ...`, and `run` for a script of one's own.

Nothing here imports torch before its version was looked at, so that a wrong one is one line and not a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, NoReturn

from trainer.bounded import within
from trainer.sagemaker.failure import failing_noted, write_failure
from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT, leaving_at_once

if TYPE_CHECKING:
    from trainer.sagemaker.job import TrainingJob
    from trainer.trainer import Trainer


_ASKING_S = 30.0
_PARENT = os.getppid()  # before anything slow is imported, in which time it may go


def run(trainer_class: type[Trainer] | None = None, *defaults: str) -> None:
    """Train as the command line says, and exit.

    The one line of a script that subclasses `Trainer`:

        if __name__ == "__main__":
            run(MyTrainer, "trainer.max_steps=500")

    Args:
        trainer_class: a subclass of `Trainer` that is a keyword-only dataclass; None: `Trainer` itself.
        defaults: overrides that apply unless the command line says otherwise.

    Raises:
        SystemExit: 0 finished; 2 wrong input; 75 stopped with a checkpoint, start again to go on; 1 anything else.
    """
    with leaving_at_once(_launcher()), failing_noted():
        code = exit_code(lambda: _train(trainer_class, defaults))
    sys.exit(code)


def _launcher() -> int:
    """Process number of what started this one; what our launcher says is believed where it may be gone already."""
    import psutil

    told = int(os.environ.get("SHARDWRIGHT_LAUNCHER", _PARENT))
    return _PARENT if psutil.pid_exists(told) else told


def exit_code(command: Callable[[], int]) -> int:
    """Run `command`; wrong input and a run that can't go on become one line on stderr, from one rank."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that is gone is worth no stack trace
    try:
        if problem := unsupported_torch():
            write_failure(f"ConfigError: {problem}")
            print(f"ConfigError: {problem}", file=sys.stderr)
            return EXIT_WRONG_INPUT
        return _exit_code(command)
    except KeyboardInterrupt:  # before the loop listens: nothing to save yet
        return 130


def _exit_code(command: Callable[[], int]) -> int:
    from strategies.errors import ConfigError, TrainingError

    try:
        return command()
    except ConfigError as error:
        _say_once(f"ConfigError: {error}")
        return EXIT_WRONG_INPUT
    except TrainingError as error:
        _say_once(f"TrainingError: {error}", anybody=True)
        return 1
    except Exception as error:
        _say_to_those_who_wait(error)
        raise


def _say_to_those_who_wait(error: Exception) -> None:
    """Before the ranks are connected, they wait for each other, and would for long."""
    from strategies.errors import ConfigError
    from strategies.meeting import fall
    from strategies.world import Launch, open_store

    with contextlib.suppress(ConfigError):
        launch = Launch.from_env()
        why = " ".join(f"{type(error).__name__}: {error}".split())
        if launch.size > 1:
            within(_ASKING_S, lambda: fall(open_store(launch), launch.rank, why), None)


def unsupported_torch() -> str | None:
    """What is wrong with the installed torch; None: nothing, or this is a checkout that isn't installed."""
    from packaging.requirements import Requirement

    try:
        wanted = next(need for need in map(Requirement, requires("shardwright") or []) if need.name == "torch")
    except (PackageNotFoundError, StopIteration):
        return None
    try:
        found = version("torch")
    except PackageNotFoundError:
        return f"Install: there is no torch, {wanted.specifier} is needed. pip install 'shardwright[torch]'."
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"Install: torch {found} is outside {wanted.specifier}. pip install 'shardwright[torch]'."


def _say_once(line: str, *, anybody: bool = False) -> None:
    """From rank 0; from another rank only if rank 0 has nothing to say about it.

    Args:
        line: what to say.
        anybody: from whichever rank comes first, since rank 0 may be the one that is gone.
    """
    from strategies.errors import ConfigError
    from strategies.world import Launch, open_store

    line = " ".join(line.split())
    write_failure(line)
    try:
        launch = Launch.from_env()
    except ConfigError:
        launch = Launch()
    mine = f"{launch.rank}: {line}"

    def first() -> str:
        store = open_store(launch)
        if launch.rank != 0 and not anybody:
            with contextlib.suppress(RuntimeError):  # its time is up
                store.wait(["said"], timedelta(seconds=1))
        return store.compare_set("said", "", mine).decode()

    # The store may be gone with rank 0, or silent: better said twice than never.
    if launch.size > 1 and within(_ASKING_S, first, mine) != mine:
        return
    print(line, file=sys.stderr, flush=True)


def _train(trainer_class: type[Trainer] | None, defaults: Sequence[str]) -> int:
    from trainer.first_import import first_import_of

    with first_import_of("torch"):
        from omegaconf import OmegaConf

        from trainer import checking
        from trainer.build import makes_its_own, parts_of, train
        from trainer.commands.deliver import deliver
        from trainer.config import register_schemas, with_config
        from trainer.sagemaker.environment import put_right
        from trainer.sagemaker.job import TrainingJob, words_of
        from trainer.trainer import Trainer

    cls = trainer_class or Trainer
    register_schemas(cls)
    job = TrainingJob.from_env()
    if job is not None:
        sys.argv[1:] = [*job.overrides(), *words_of(sys.argv[1:])]
        _put_before(job.defaults())
    _refuse_unknown_flags(sys.argv[1:])
    OmegaConf.register_new_resolver("choices", _choices, replace=True)
    own = [f"{group}=own" for group in ("model", "data") if makes_its_own(cls, group)]
    if (jobs := checking.asked_for()) is not None:
        composed: list[object] = []

        def check(words: list[str]) -> None:
            sys.argv[1:] = words
            _put_before([*own, *defaults])
            with_config(lambda config, choices: composed.append(parts_of(config, choices)))

        checking.check(jobs, check)
        return 0
    _put_before([*own, *defaults])
    if job is not None:
        _say_first([*put_right(), *_fill_in_channels(job, own)])
    after = None if job is None else functools.partial(deliver, job.model_dir)
    stopped: list[bool] = []
    with_config(lambda config, choices: stopped.append(train(config, choices, after).stopped))
    return EXIT_STOPPED if any(stopped) else 0


def _fill_in_channels(job: TrainingJob, own: Sequence[str]) -> list[str]:
    """Point the data at SageMaker's channels, unless the Trainer makes its own; lines for the log."""
    from trainer.config import settings_of
    from trainer.sagemaker.job import channel_overrides

    if "data=own" in own:
        return []
    words, unused = channel_overrides(job.channels, settings_of("data", sys.argv[1:]))
    _put_before(words)
    filled = [f"from SageMaker's channels: {' '.join(words)}"] if words else []
    left = "the chosen data takes nothing from the channel {}; where it belongs, write ${{oc.env:SM_CHANNEL_{}}}"
    return filled + [left.format(name, name.upper()) for name in unused]


def _say_first(lines: Sequence[str]) -> None:
    """From rank 0, before there is a display."""
    from strategies.world import Launch

    if Launch.from_env().rank == 0:
        for line in lines:
            print(line, flush=True)


def _refuse_unknown_flags(words: Sequence[str]) -> None:
    """Hydra would say it in several lines, and exit by itself."""
    from hydra._internal.utils import get_args_parser

    from strategies.errors import ConfigError

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"Configuration: {message}. Write key=value; --help lists the keys.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(list(words))


def _choices() -> str:
    """The options of each group, one line each; for the help text (conf/config.yaml)."""
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in sorted(loader.list_groups("")) if group not in ("hydra", "schema")]
    return "\n".join(f"{group}: {', '.join(loader.get_group_options(group))}" for group in groups)


def _put_before(overrides: Sequence[str]) -> None:
    """Add overrides to the command line, except those whose key is there already."""
    given = {argument.partition("=")[0].lstrip("+~") for argument in sys.argv[1:]}
    sys.argv[1:1] = [override for override in overrides if override.partition("=")[0].lstrip("+~") not in given]


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command `shardwright`.

    Raises:
        SystemExit: with the command's exit code; 2 where there is no such command.
    """
    from trainer.commands import COMMANDS

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        print(_usage(), end="", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help"):
        print(_usage(), end="")
        sys.exit(0)
    if name == "--version":
        print(f"shardwright {_version()}")
        sys.exit(0)
    if name == "train":
        sys.argv = ["shardwright train", *rest]
        run()
    if name not in COMMANDS:
        known = ["train", *COMMANDS]
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"Nearest: {near[0]}." if near else f"Choices: {', '.join(known)}."
        print(f"ConfigError: shardwright: there is no command {name!r}. {fix}", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
    options = COMMANDS[name].parse(rest)
    sys.exit(exit_code(lambda: COMMANDS[name].run(options)))


def _version() -> str:
    try:
        return version("shardwright")
    except PackageNotFoundError:
        return "(a checkout that isn't installed)"


def _usage() -> str:
    from trainer.commands import COMMANDS

    told = {"train": "train as the configuration says"} | {name: command.help for name, command in COMMANDS.items()}
    lines = ["usage: shardwright COMMAND [arguments]", ""]
    lines += [f"  {name:<{max(map(len, told))}}  {text}" for name, text in told.items()]
    return "\n".join([*lines, "", "Each command explains itself with --help.", ""])
