"""Start a training job: in processes of this machine, or wherever the chosen launcher starts it."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import Parser, multirun

if TYPE_CHECKING:
    from trainer.launch import Launcher

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "train.py"


def parser() -> Parser:
    """`shardwright launch`'s own options."""
    found = Parser(
        "launch",
        "Start a training job: in several processes of this machine, or elsewhere (launcher=...). launcher.key=value "
        "says how; everything else goes to the training script, as in: shardwright launch --nproc-per-node 2 "
        "trainer.max_steps=100. The exit code is that of the first process that failed: 0 finished, 2 wrong input, "
        "75 stopped with a checkpoint (start again to go on). Many jobs at once: --multirun.",
        rest=True,
    )
    found.add_argument("--nproc-per-node", "--nproc_per_node", type=int, metavar="N", help="default: GPUs, or 2")
    found.add_argument(
        "--max-restarts", "--max_restarts", type=int, metavar="N", help="times to go on after a crash; default: 0"
    )
    found.add_argument("--dry-run", action="store_true", help="show what would be started, and start nothing")
    found.add_argument("--name", help="of the run, where it is started elsewhere; default: run.name, or made")
    found.add_argument("--script", type=Path, default=SCRIPT, help="a script of your own that calls trainer.run")
    multirun.add_options(found)
    return found


def main(options: Namespace) -> int:
    """Answers with the exit code of the first worker that failed, where bare torchrun answers 1."""
    from trainer.launch import LaunchJob, LocalLauncher

    multirun.refuse_alone(options)
    ours, others = split(options.rest)
    flags = {"processes": options.nproc_per_node, "max_restarts": options.max_restarts}
    launcher = launcher_of(ours, {key: value for key, value in flags.items() if value is not None})
    if options.multirun:
        return multirun.main(options, launcher, others)
    here = isinstance(launcher, LocalLauncher)
    name, folder = (options.script.stem, None) if here else run_of(options.script, others, options.name)
    job = LaunchJob(name=name, script=options.script, overrides=tuple(others), run_dir=folder)
    launcher.check([job])
    if options.dry_run:
        print(launcher.shown(job))
        return 0
    return launcher.run(job)


def run_of(script: Path, words: Sequence[str], given: str | None = None) -> tuple[str, Path]:
    """What the run is called, by which a later job finds its checkpoints, and its folder on a disk of this machine.

    A job that wouldn't compose is refused.

    Raises:
        ConfigError: something about the words is wrong, or a script of one's own has no name.
    """
    from strategies.errors import ConfigError
    from trainer.place import at_home

    if script.resolve() == SCRIPT:
        from trainer.config import composed, resolved
        from trainer.run_folder import run_name

        # What only the machine there knows can't be looked at here.
        config, choices = composed([word for word in words if "${oc.env:" not in word])
        plain = resolved(config)
        where = plain["run"]
        folder = Path(where["dir"] or Path("runs") / (where["name"] or given or run_name(plain, choices)))
        return given or where["name"] or folder.name, at_home(folder)
    said = [word for word in words if re.match(r"[+]*run\.(name|dir)=", word)]
    values = [Path(word.partition("=")[2].strip("'\"")) for word in said]
    if name := given or (values[-1].name if values else ""):
        in_runs = not said or "run.name=" in said[-1]
        return name, at_home(Path("runs") / (values[-1] if values else name) if in_runs else values[-1])
    raise ConfigError(
        f"launch: what is the run of {script.name} called? A later job goes on from the checkpoints under this name. "
        "Give one, as in --name first (--name)."
    )


def launcher_of(words: Sequence[str], flags: Mapping[str, int]) -> Launcher:
    """The launcher that `launcher=...` and `launcher.key=value` describe, and flags that stand for such words.

    Raises:
        ConfigError: something about them is wrong.
    """
    if not words:  # most often; knowing every group's classes takes a second
        from trainer.launch import LocalLauncher

        return LocalLauncher(**flags)
    from trainer.config import compose_launcher

    return compose_launcher([*words, *(f"launcher.{key}={value}" for key, value in flags.items())])


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's words, and those of the job."""
    ours = [word for word in words if re.match(r"[+~]*launcher[.=@]", word)]
    return ours, [word for word in words if word not in ours]
