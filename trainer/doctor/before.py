"""The short form, in the first seconds of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from strategies.errors import TrainingError
from strategies.world import World
from trainer.metrics.logs import LOGGER
from trainer.place import at_home


def examine_first(world: World, folder: Path, cache: Path) -> None:
    """Before the model is built: look at every host, measure a little, and end the run where something failed.

    Args:
        world: all ranks, connected.
        folder: the run's; `doctor.json` is written there.
        cache: for tokenised data.

    Raises:
        TrainingError: something failed, or a rank was lost; on every rank.
    """
    from trainer.doctor.examine import Wanted, examine_connected
    from trainer.doctor.findings import Level, plural
    from trainer.doctor.report import write

    report = examine_connected(world, Wanted(quick=True, folders=(folder, at_home(cache))), lambda what: None)
    failed: list[str] = []
    with world.together():
        if world.rank == 0:
            write(report, folder, "run.dir", picture=False)
            warned = [each.line() for each in report.findings if each.level is Level.warning]
            failed = [each.line() for each in report.findings if each.level is Level.failure]
            for line in (*warned, *failed):
                LOGGER.warning("doctor: %s", line)
            sys.stdout.write("".join(f"doctor: {line}\n" for line in warned))
    failed = world.broadcast(failed)
    if failed:
        more = f" And {plural(len(failed) - 1, 'more failure')} in {folder / 'doctor.json'}." if len(failed) > 1 else ""
        raise TrainingError(f"doctor: {failed[0]}{more} Put it right, or start without doctor=quick.")
