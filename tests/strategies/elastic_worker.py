"""The script of tests of horovodrun's elastic mode: a small job, one of whose workers is killed on the way.

python tests/strategies/elastic_worker.py strategy=horovod_elastic hooks=fate hooks.fate.victim=0 key=value ...
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.trainer.jobs import Rows
from trainer import register, run
from trainer.hooks.base import Hook, Moment


@register("hooks", "fate")
@dataclass(kw_only=True)
class Fate(Hook):
    """Kills a rank after a step, once in a run, and leaves a file that says so."""

    step: int = 6
    victim: int = 0

    def on_log(self, moment: Moment) -> str | None:
        note = moment.folder / "happened"
        if moment.progress.step == self.step and moment.world.rank == self.victim and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return None


if __name__ == "__main__":
    run(Rows)
