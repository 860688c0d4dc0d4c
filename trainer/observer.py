"""Everything that a run says of itself: display, log lines, `metrics.jsonl`, loggers, summary and plots."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from strategies.base import Batch
from strategies.elastic import RanksChanged
from strategies.errors import ConfigError
from strategies.world import Launch, World
from trainer.assembly import Parts
from trainer.metrics.base import AbstractLogger
from trainer.metrics.clock import StepClock
from trainer.metrics.display import Display
from trainer.metrics.events import EVENTS, history, note, read_events
from trainer.metrics.jsonl import MetricsFile
from trainer.metrics.loggers import Loggers
from trainer.metrics.memory import peak_memory_mib
from trainer.metrics.plots import write_plots
from trainer.metrics.stragglers import Stragglers, slowest_of
from trainer.metrics.summary import summary_table, write_summary
from trainer.metrics.throughput import flops_utilisation, peak_flops, training_flops_per_token
from trainer.planner.beside import Prediction
from trainer.profiling.base import AbstractProfiler, Window
from trainer.profiling.sample import CommunicationSample
from trainer.progress import Progress
from trainer.pulse import PULSE
from trainer.run_folder import describe
from trainer.secrets import hidden, redacted_words


def draw_plots(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Draw the plots of the run in `folder`, with a mark wherever it went on after a stop; the files."""
    resumes = [each.step for each in history(read_events(folder)) if each.kind == "resume" and each.step]
    return write_plots(folder, resumes, say)


class Observer:
    """Used on every rank alike; only rank 0 shows and writes, the others keep their log file."""

    def __init__(
        self,
        folder: Path,
        world: World,
        loggers: Mapping[str, AbstractLogger],
        config: Mapping[str, Any],
        strategy: str,
        profiler: AbstractProfiler | None = None,
    ) -> None:
        """Ready to `say`; everything else comes after `open`.

        Args:
            folder: the run's.
            world: who takes part.
            loggers: by name.
            config: resolved, without secrets.
            strategy: as it was chosen.
            profiler: is turned on for some of the steps.

        Raises:
            ConfigError: a logger can't work here; on every rank where it lives.
        """
        self.clock = StepClock()
        self._folder = folder
        self._world = world
        self._strategy = strategy
        self._step = 0
        self._under_way = False
        self._config = config
        self._display = Display(None, world.rank)
        here = {name: logger for name, logger in loggers.items() if world.rank == 0 or logger.every_rank}
        self._loggers = Loggers(here, self.say)
        self._loggers.join(world, folder)
        self._file: MetricsFile | None = None
        self._window = None if profiler is None else Window(profiler, world, folder, self.clock, self.say)
        self._may_sample = profiler is None or not profiler.has_device
        self._sample = CommunicationSample(world, self.clock, self.say)
        self._stragglers = Stragglers()
        self._pace: dict[str, float] = {}
        self._prediction: Prediction | None = None

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        PULSE.beat()
        self._display.message(text)

    def fell_back(self, text: str) -> None:
        """A damaged checkpoint was passed over; `text` says which, why, and what was taken instead."""
        self._warn("fell_back", text)

    def continuity(self, text: str) -> None:
        """The numbers after a resume don't fit those before; `text` says which and by how much."""
        self._warn("continuity", text)

    def open(
        self,
        progress: Progress,
        parts: Parts,
        total_steps: int | None,
        changes: Sequence[str],
        checkpoint: str | None = None,
    ) -> None:
        """The run is about to take its first step of this start.

        Args:
            progress: where it goes on from.
            parts: what it works with.
            total_steps: where it ends, if that is known.
            changes: in the configuration since the checkpoint that it goes on from.
            checkpoint: the address of that one; None: it begins afresh.

        Raises:
            ConfigError: a logger's library is missing, or the folder can't be written; on every rank.
        """
        with self._world.together():
            self._loggers.open(self._folder, self._config, progress.step)
            if self._world.rank == 0:
                self._open_files(progress.step, changes, checkpoint)
        more = {"final_step": total_steps, "strategy": self._strategy, "restarts": Launch.from_env().restart}
        self._loggers.event("start", {**progress.to_json(), **more})
        self._step, self._under_way = progress.step, True
        self._display.set_total(total_steps, progress.step)
        self._display.start()
        self._num_parameters, self._num_trainable = parts.spec.num_parameters, parts.spec.num_trainable
        plan = parts.plan
        self._global_batch = plan.micro_batch * plan.accumulation * self._world.data_size
        self._peak_flops = peak_flops(self._world.device, parts.plan.precision.numbers)
        self._prediction = parts.prediction
        if self._prediction is not None:
            self.say(self._prediction.describe())
            with contextlib.suppress(OSError):
                self._prediction.write(self._folder)
        if self._window is not None:
            self._window.begin(progress.step, total_steps)
        self.clock.lap()

    def watching(self, every: int | None) -> AbstractContextManager[Any]:
        """Around a step: on an accelerator one step in `every` is watched for its communication; None: none."""
        return self._sample.around(every if self._may_sample else None)

    def advance(self, step: int) -> None:
        """A step was done; cheap."""
        self._step = step
        PULSE.stepped(step)
        self._display.advance(step)
        self._loggers.advance(step)
        if self._window is not None:
            self._window.advance(step)

    def reduce(self, sums: Sequence[float]) -> list[float]:
        """A logged step's numbers, summed over the ranks; in the same message, each rank's own pace. Collective."""
        rank, size = self._world.rank, self._world.size
        if size == 1:
            return self._world.reduce(sums)
        votes = [0.0] * (2 * size)
        votes[rank], votes[size + rank] = self.clock.own_s()
        answer = self._world.reduce_later(sums, votes=votes)
        with PULSE.waiting("a logged step's numbers"):
            found = answer()
        work, data = found[-2 * size : -size], found[-size:]
        slowest, median = slowest_of(work)
        self._pace = {"slowest_rank": slowest, "straggle": work[slowest] / median - 1 if median > 0 else 0.0}
        if (slow := self._stragglers.note(work, data)) is not None:
            self._warn("straggler", slow.words(self._world.gather(platform.node())[slow.rank]))
        return found[: -2 * size]

    def log(self, progress: Progress, numbers: Mapping[str, float]) -> dict[str, float]:
        """A step's numbers, with its times and memory added; the same on every rank but for the times."""
        window = self.clock.window()
        if self._prediction is not None:
            self._prediction.note(window)
        found = {**numbers, **window, "memory_mib": peak_memory_mib(self._world.device)}
        found |= self._pace
        if progress.tokens == 0 and "step_s" in found:  # what is trained has no tokens
            del found["tokens_per_s"]
            found["samples_per_s"] = self._global_batch / found["step_s"]
        if self._peak_flops is not None and "tokens_per_s" in found:
            per_token = training_flops_per_token(self._num_parameters, num_trainable=self._num_trainable)
            found["mfu"] = flops_utilisation(found["tokens_per_s"], per_token, self._peak_flops, self._world.size)
        self._display.step(progress.step, found)
        self._write(progress.step, found)
        return found

    def evaluated(self, progress: Progress, numbers: Mapping[str, float]) -> None:
        """Numbers of an evaluation."""
        self._display.evaluated(progress.step, numbers)
        self._write(progress.step, numbers)

    def evaluating(self, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        """`batches`, shown as they go by."""
        self._display.evaluation(0, total)
        for done, batch in enumerate(batches, start=1):
            yield batch
            PULSE.beat()
            self._display.evaluation(min(done, total), total)
            self._loggers.advance(self._step)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        self._display.checkpoint(done=False)
        self._loggers.event("saving", {"now": True})
        try:
            yield
        finally:
            self._display.checkpoint(done=True)
            self._loggers.event("saving", {"now": False})

    def saved(self, step: int, *, seconds: float, stall_s: float, num_bytes: int) -> None:
        """A checkpoint is complete.

        Args:
            step: that it holds.
            seconds: from its beginning until it was published.
            stall_s: seconds of these that the steps stood still for it.
            num_bytes: of all its files, of all ranks.
        """
        self._note("checkpoint", step=step, seconds=seconds, stall_s=stall_s, bytes=num_bytes)

    def text(self, step: int, name: str, text: str) -> None:
        """A text for the loggers."""
        self._loggers.text(step, name, text)

    def rolled_back(self, progress: Progress) -> None:
        """Drop what was written after `progress.step`."""
        self._note("rollback", step=progress.step, last_seen_step=self._step)
        self._step = progress.step
        if self._file is not None:
            self._file.rewind(progress.step)
        self._loggers.rewind(progress.step)

    def finish(self, progress: Progress, reason: str, *, stopped: bool) -> None:
        """Write the summary and the plots, and show them."""
        PULSE.finishing("finishing")
        self._end("stopped" if stopped else "finished", reason)
        if self._window is not None:
            self._window.close(keep=True)
        peak = self._world.reduce([peak_memory_mib(self._world.device)], "max")[0]
        progress.seconds += self.clock.lap()
        more: dict[str, Any] = {"num_parameters": self._num_parameters, "world_size": self._world.size}
        more |= {"stopped": stopped, "communication_total_s": self.clock.communication_total_s()}
        if self._prediction is not None:
            more |= self._prediction.beside(peak)
        if self._world.rank == 0:
            try:
                summary = write_summary(
                    self._folder,
                    reason=reason,
                    progress=progress.to_json(),
                    times=self.clock.totals(),
                    peak_memory_mib=peak,
                    more=more,
                )
                draw_plots(self._folder, self.say)
                self._display.close()
                self._display.show(summary_table(summary, self._folder))
            except OSError as error:  # everything that matters is in the checkpoint
                self.say(f"the summary can't be written: {error}")
        self.say(f"{reason}; the same command goes on" if stopped else reason)
        self._world.barrier()  # a launcher ends the other ranks when the first is gone

    def has_finished(self, step: int) -> bool:
        """Whether an earlier start has ended this run at `step`, with all that belongs to an end. Collective."""
        try:
            summary = json.loads((self._folder / "summary.json").read_text())
            mine = summary["step"] == step and not summary["stopped"]
        except (OSError, ValueError, LookupError, TypeError):
            mine = False
        return self._world.broadcast(mine)

    def _open_files(self, step: int, changes: Sequence[str], checkpoint: str | None) -> None:
        try:
            self._file = MetricsFile(self._folder / "metrics.jsonl", step)
            describe(self._folder, self._config, self._world)
            note(
                self._folder,
                "start",
                step=step,
                last_seen_step=self._file.reached,
                checkpoint=checkpoint,
                strategy=self._strategy,
                world_size=self._world.size,
                device=self._world.device.type,
                host=platform.node(),
                restarts=Launch.from_env().restart,
                changes=list(changes),
            )
        except OSError as error:
            raise ConfigError(
                f"Run: {self._folder} can't be written: {error.strerror}. Free space, or choose another (run.dir)."
            ) from error

    def close(self, error: BaseException | None = None) -> None:
        """Flush and leave the terminal as it was; may be called twice.

        Args:
            error: what ended the run; None: nothing did, or nobody knows.
        """
        if self._window is not None:
            self._window.close(keep=False)
        if error is not None:
            outcome = "left" if isinstance(error, RanksChanged) else "failed"
            self._end(outcome, f"{type(error).__name__}: {error}")
        self._display.close()
        self._loggers.close()
        if self._file is not None:
            self._file.close()

    def _end(self, outcome: str, reason: str) -> None:
        if self._under_way:
            [reason] = redacted_words([hidden(reason)])
            self._note("end", step=self._step, outcome=outcome, reason=reason)
        self._under_way = False

    def _warn(self, event: str, text: str) -> None:
        self._display.warning(text)
        self._note(event, step=self._step if self._under_way else None, text=text)

    def _note(self, event: str, **entries: Any) -> None:
        self._loggers.event(event, entries)
        if self._world.rank == 0:
            try:
                note(self._folder, event, **entries)
            except OSError as error:  # as with metrics.jsonl: the training matters more
                self.say(f"{EVENTS} can't be written, a line of kind {event} is missing there: {error}")

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._file is not None:
            try:
                self._file.write(step, numbers)
            except OSError as error:  # the training matters more; its checkpoints say what a full disk means
                self.say(f"metrics.jsonl can't be written, step {step} is missing there: {error}")
        self._loggers.log(step, numbers)
