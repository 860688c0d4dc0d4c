"""Our side of `scripts/bench.py`: `scripts/train.py` with a hook that reads the clocks at each logged step."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that isn't installed, as in a container

from trainer import register, run
from trainer.hooks.base import Hook, Moment


@register("hooks", "clocks")
@dataclass(kw_only=True)
class Clocks(Hook):
    """Wall-clock and CPU time of each logged step, and the most memory so far; one file for each rank."""

    def __post_init__(self) -> None:
        self._marks: list[tuple[int, float, float]] = []
        self._first_step_at = 0.0

    def on_log(self, moment: Moment) -> None:
        """See `Hook.on_log`."""
        self._marks.append((moment.progress.step, time.perf_counter(), time.process_time()))
        self._first_step_at = self._first_step_at or time.time()

    def on_end(self, moment: Moment) -> None:
        """See `Hook.on_end`."""
        record = {
            "marks": self._marks,
            "first_step_at": self._first_step_at,
            "peak_mib": moment.metrics["memory_mib"],
            "loss": moment.metrics["loss"],
        }
        (moment.folder / f"clocks-{moment.world.rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    run()
