"""Where a run ends, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a run that follow from its configuration and its data."""

    global_batch: int
    max_steps: int | None
    max_samples: dict[str, int]
    """The key of each limit that counts samples -> how many it allows in all."""

    def steps_in_all(self, progress: Progress) -> tuple[int | None, str]:
        """The step at which the run ends, and the key that says so; None: only time decides.

        Steps that were taken with another global batch, or again after a rollback, don't shift where the
        samples end.

        Args:
            progress: so far.
        """
        found = [] if self.max_steps is None else [(self.max_steps, "trainer.max_steps")]
        for key, samples in self.max_samples.items():
            left = max(0, samples - progress.samples)
            found.append((progress.step + -(-left // self.global_batch), key))
        return min(found) if found else (None, "trainer.max_time")
