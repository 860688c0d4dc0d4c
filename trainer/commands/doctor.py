"""What every host of a job has, how fast its ranks can talk, and what is wrong; alone or under any launcher."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import Parser

if TYPE_CHECKING:
    from strategies.backends import Backend
    from trainer.doctor.examine import Report

_LONGEST_WAIT_S = 24 * 3600.0


def parser() -> Parser:
    """`shardwright doctor`'s own options."""
    found = Parser(
        "doctor",
        "Look at this machine, and with several ranks at every host and what lies between them: versions, GPUs, EFA, "
        "disks, limits, clocks, then collectives and every pair of hosts. Names what is slow or wrong, and ends with 1 "
        "where something failed. For several processes start it as the job will be: "
        "torchrun --nproc-per-node 8 ... scripts/doctor.py, srun, mpirun.",
    )
    found.add_argument("--quick", action="store_true", help="seconds instead of minutes: fewer sizes and fewer pairs")
    found.add_argument("--json", type=Path, metavar="FOLDER", help="write doctor.json and doctor.png there")
    found.add_argument("--instance-type", metavar="TYPE", help="what to hold the hosts against; default: as they say")
    found.add_argument("--wait", type=float, default=60.0, metavar="S", help="for ranks that are missing; default: 60")
    found.add_argument("keys", nargs="*", metavar="key=value", help="as for train; read are backend, run and cache")
    return found


def main(options: Namespace) -> int:
    """Print a table, and write `doctor.json` and a picture where asked; 1 where something failed."""
    from strategies.errors import ConfigError
    from strategies.world import Launch
    from trainer.doctor import instances
    from trainer.doctor.examine import Wanted, examine
    from trainer.doctor.report import writable, write
    from trainer.doctor.table import Progress, show

    if not 1 <= options.wait <= _LONGEST_WAIT_S:
        raise ConfigError(f"doctor: --wait={options.wait:g} is not in 1 to {_LONGEST_WAIT_S:g}. Give seconds (--wait).")
    kind = None if options.instance_type is None else instances.given(options.instance_type)
    backend, folders = _chosen(options.keys)
    wanted = Wanted(quick=options.quick, folders=folders, instance_type=kind, wait_s=options.wait)
    folder: Path | None = options.json

    def ready() -> None:
        if folder is not None:
            writable(folder, "--json")

    def finish(report: Report) -> None:
        progress.close()
        show(report.title, report.findings, report.measured.collectives)
        if folder is not None:
            write(report, folder, "--json")

    with Progress(Launch.from_env().rank == 0) as progress:
        failed = examine(wanted, backend, ready, finish, progress.say)
    return 1 if failed else 0


def _chosen(keys: list[str]) -> tuple[Backend, tuple[Path, ...]]:
    """The backend of the job, and the folders that it would write."""
    from strategies.backends import AutoBackend

    if not keys:
        return AutoBackend(), (Path.cwd(),)
    from trainer.config import compose, made
    from trainer.place import at_home

    config = compose(keys)
    return made(config.backend), (at_home(config.run.dir or "runs"), at_home(config.cache))
