"""The commands: `shardwright train ...`, and `run` for a script of one's own.

Nothing here imports torch before its version was looked at, so that a wrong one is one line and not a traceback.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.trainer import Trainer

EXIT_WRONG_INPUT = 2


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
    sys.exit(exit_code(lambda: _train(trainer_class, defaults)))


def exit_code(command: Callable[[], int]) -> int:
    """Run `command`; wrong input and a run that can't go on become one line on stderr, from one rank."""
    if problem := unsupported_torch():
        print(f"ConfigError: {problem}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    from strategies.errors import ConfigError, TrainingError

    try:
        return command()
    except ConfigError as error:
        _say_once(f"ConfigError: {error}")
        return EXIT_WRONG_INPUT
    except TrainingError as error:
        _say_once(f"TrainingError: {error}")
        return 1
    except KeyboardInterrupt:  # before the loop listens: nothing to save yet
        return 130


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


def _say_once(line: str) -> None:
    """From rank 0; from another rank only if rank 0 has nothing to say about it."""
    from strategies.errors import ConfigError
    from strategies.world import Launch, open_store

    line = " ".join(line.split())
    try:
        launch = Launch.from_env()
    except ConfigError:
        launch = Launch()
    if launch.size > 1:
        with contextlib.suppress(Exception):  # the store may be gone with rank 0: better said twice than never
            store = open_store(launch)
            if launch.rank == 0:
                store.set("said", line)
            else:
                time.sleep(1.0)
                if store.check(["said"]):
                    return
    print(line, file=sys.stderr, flush=True)


def _train(trainer_class: type[Trainer] | None, defaults: Sequence[str]) -> int:
    from trainer.build import makes_its_own, train
    from trainer.config import register_schemas, with_config
    from trainer.stop import EXIT_STOPPED
    from trainer.trainer import Trainer

    cls = trainer_class or Trainer
    register_schemas(cls)
    own = [f"{group}=own" for group in ("model", "data") if makes_its_own(cls, group)]
    _put_before([*own, *defaults])
    stopped: list[bool] = []
    with_config(lambda config, choices: stopped.append(train(config, choices).stopped))
    return EXIT_STOPPED if any(stopped) else 0


def _put_before(overrides: Sequence[str]) -> None:
    """Add overrides to the command line, except those whose key is there already."""
    given = {argument.partition("=")[0].lstrip("+~") for argument in sys.argv[1:]}
    sys.argv[1:1] = [override for override in overrides if override.partition("=")[0].lstrip("+~") not in given]


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command `shardwright`."""
    from trainer.commands import COMMANDS

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        sys.exit(0 if words else EXIT_WRONG_INPUT)
    if words[0] == "--version":
        print(f"shardwright {version('shardwright')}")
        sys.exit(0)
    name, rest = words[0], words[1:]
    sys.argv = [f"shardwright {name}", *rest]
    if name == "train":
        run()
    if name not in COMMANDS:
        near = _nearest(name, ["train", *COMMANDS])
        print(f"ConfigError: shardwright: there is no command {name!r}. {near}", file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
    sys.exit(exit_code(lambda: COMMANDS[name].run(rest)))


def _nearest(word: str, choices: list[str]) -> str:
    from trainer.run_folder import nearest

    return nearest(word, choices)


def _usage() -> str:
    from trainer.commands import COMMANDS

    lines = ["usage: shardwright COMMAND [arguments]", "", "  train    train as the configuration says"]
    lines += [f"  {name:<8} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "Each command explains itself with --help.", ""])
