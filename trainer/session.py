"""What lives between the start and the end of a `fit`, and each thing that the loop does with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from strategies.base import Batch, LossSum, LossTerms, StepInfo
from strategies.elastic import RanksChanged
from strategies.errors import TrainingError
from trainer.assembly import assemble, workers_of
from trainer.continuity import Continuity
from trainer.data import evaluation_batches
from trainer.ema import WeightAverage
from trainer.evaluation import EvaluationStopped, as_ratios, evaluate_batches, until_stopped
from trainer.feed import AT_ONCE_S, Feed, GlobalStep
from trainer.hooks.base import Moment
from trainer.job import Job
from trainer.keeper import Commit, Keeper
from trainer.observer import Observer
from trainer.progress import Progress
from trainer.pulse import beating
from trainer.shortage import told
from trainer.stop import StopRequest, seconds

if TYPE_CHECKING:
    from trainer.trainer import Trainer

_PATIENCE = 100
"""Steps skipped in a row after which a run counts as diverged."""
_UNREAD = 1000
"""Steps whose flags may wait to be read together."""
_MAX_ROLLBACKS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    progress: Progress
    reason: str
    stopped: bool
    """Before its end, with a checkpoint: the same command goes on."""
    metrics: dict[str, float]
    """The newest numbers."""


class Session:
    """The parts of one `fit` in use. Used as a context: leaving it closes what it opened."""

    def __init__(self, trainer: Trainer, job: Job) -> None:
        self.trainer = trainer
        self.job = job
        self.world = job.world
        self.strategy = job.strategy
        self.progress = Progress()
        self.metrics: dict[str, float] = {}
        self.reason: str | None = None
        self._wish: str | None = None
        self._stopped = False
        self._begun_at = 0
        self._saved_at: int | None = None
        self._evaluated_at: int | None = None
        self._evaluation_due = False
        self._fresh: dict[str, float] = {}  # numbers of this very step
        self._continuity = Continuity()
        self._skips: list[Tensor] = []  # of each step, not yet read from the device
        self._in_a_row = self._unreported = 0
        self._warned = self._warned_of_copies = False

    def __enter__(self) -> Session:
        limit = seconds(self.trainer.max_time, "trainer.max_time")
        grace = seconds(self.trainer.grace, "trainer.grace")
        self.request = StopRequest(limit, announce=self.world.rank == 0, grace_s=grace)
        job, chosen = self.job, self.job.choices.get("strategy") or type(self.strategy).__name__
        self.observer = Observer(job.folder, self.world, job.loggers, job.config, chosen, job.profiler)
        self.clock = self.observer.clock
        decay = self.trainer.ema_decay
        self.average = None if decay is None else WeightAverage(decay)
        try:
            self.parts = assemble(self.trainer, self.job, self.observer.say)
            self.keeper = Keeper(
                job=self.job,
                parts=self.parts,
                average=self.average,
                say=self.observer.say,
                warn=self.observer.fell_back,
            )
        except BaseException as error:
            self._close(error)
            raise
        self.model, self.optimizer = self.parts.model, self.parts.optimizer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keeper.files.close()
        self.parts.loader.close()
        self._close(error)

    def _close(self, error: BaseException | None = None) -> None:
        self.observer.close(error)
        self.request.close()

    def told(self) -> AbstractContextManager[None]:
        """Within, a lack of memory says in which step it happened."""
        return told(lambda: self.progress.step + 1, self.parts.spec, self.parts.plan)

    def start(self) -> None:
        """Go on from a checkpoint if there is one, and say what is about to happen."""
        say = self.observer.say
        changes: list[str] = []
        found = self.keeper.to_resume()
        if found is not None:
            self.progress, record = self.keeper.load(found)
            changes = self.keeper.changes(record)
            self._saved_at = None if isinstance(found, Commit) else self.progress.step
            self._evaluation_due = record.evaluation_due
            self._continuity.resume(record.recent)
            say(f"going on from {found.address} (step {self.progress.step})")
            for change in changes:
                say(f"changed since then: {change}")
        if self.average is not None and not self.average.tensors():
            self.average.update(self.keeper.weights())
        self._begun_at = self.progress.step
        self._feed = Feed(self.parts.loader.steps(self.progress.samples), self.world, self.request)
        self.total_steps, self.limit = self.parts.limits.steps_in_all(self.progress)
        end = "until the time is up" if self.total_steps is None else f"until step {self.total_steps}"
        say(self.parts.describe(self.world, f"{end} ({self.limit})"))
        address = None if found is None else found.address
        self.observer.open(self.progress, self.parts, self.total_steps, changes, address)
        self.commit(now=True)
        self.request.listen()
        self._call_hooks("on_start")
        if self._evaluation_due and self.due(self.trainer.eval_every):
            self.evaluate(self.trainer.eval_samples)

    def next_step(self) -> GlobalStep | None:
        """The next step's input; None: a limit is reached, or all ranks agreed to stop."""
        if self.total_steps is not None and self.progress.step >= self.total_steps:
            self.reason = f"reached step {self.progress.step} ({self.limit})"
            return None
        try:
            with self.clock.measure("data"):
                step = self._feed.next(self._wish, self._steps_alone())
        except RanksChanged:
            self.commit(now=True)
            raise
        self.reason, self._stopped = step.stop, step.interrupted
        return step if self.reason is None else None

    def _steps_alone(self) -> int:
        """How many steps come, from the next one on, before anything else is done that may end the run."""
        step, total = self.progress.step, self.total_steps
        if step == 0:
            return 1  # the first is logged
        every = (self.trainer.log_every, self.trainer.eval_every, self.job.checkpoints.every)
        left = [each - step % each for each in every if each is not None]
        return min(left if total is None else [*left, total - step])

    def set_learning_rate(self) -> None:
        """A pure function of the step."""
        factor = self.job.schedule.factor(self.progress.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.parts.rates, strict=True):
            group["lr"] = rate * factor

    def count(self, step: GlobalStep, info: StepInfo) -> None:
        """Book a step that was taken; reads nothing from the device."""
        self.progress.step += 1
        self.progress.samples += self.trainer.global_batch
        self.progress.tokens += step.tokens
        self._skips.append(info.skipped)
        if len(self._skips) > _UNREAD:
            self._read_skips()
        if self.average is not None:
            self.average.update(self.keeper.weights())
        self._fresh = {}
        if self.progress.step == self._begun_at + 1:
            self.keeper.prepare()
        self.clock.step_done(info.communication_s, info.communication_total_s, tokens=step.tokens)
        self.observer.advance(self.progress.step)
        self._note_saved()

    def due(self, every: int | None) -> bool:
        """Whether something that happens every `every` steps happens now."""
        return every is not None and self.progress.step % every == 0

    def due_to_log(self) -> bool:
        """The first and the last step are logged too."""
        edge = self.progress.step in (1, self.total_steps)
        return edge or self.due(self.trainer.log_every)

    def log(self, step: GlobalStep, losses: LossSum, info: StepInfo) -> None:
        """Read the step's numbers from the device, reduce and show them; act on steps that weren't finite."""
        names = sorted(losses.metrics)
        mine = [losses.loss, *(part for name in names for part in losses.metrics[name]), info.grad_norm]
        *sums, norm = torch.stack([value.double() for value in mine]).tolist()
        loss, *rest = self.observer.reduce(sums)
        self._read_skips()
        self._fresh |= self.observer.log(
            self.progress,
            {
                "loss": loss / step.targets,
                "grad_norm": norm,
                "lr": float(self.optimizer.param_groups[0]["lr"]),
                **as_ratios(names, rest),
                "tokens": self.progress.tokens,
                "samples": self.progress.samples,
                "epoch": self.progress.samples / len(self.parts.data.train),
                "skipped": self.progress.skipped,
            },
        )
        self.metrics |= self._fresh
        self.request.reserve_s = self.keeper.save_s + max(self._fresh["step_s"], AT_ONCE_S)
        jump = self._continuity.note(self.progress.step, self._fresh["loss"], norm)
        if jump is not None:
            self.observer.continuity(jump)
        self._call_hooks("on_log")
        if self._unreported:
            self._not_finite()

    def _read_skips(self) -> None:
        flags = torch.stack(self._skips).tolist() if self._skips else []
        self._skips.clear()
        self.progress.skipped += sum(flags)
        self._unreported += sum(flags)
        longest = self._in_a_row
        for flag in flags:
            self._in_a_row = self._in_a_row + 1 if flag else 0
            longest = max(longest, self._in_a_row)
        if longest >= _PATIENCE:
            raise TrainingError(
                f"Trainer: {longest} steps in a row had a gradient that isn't finite. Lower optimizer.lr, "
                "or use precision=bf16 (optimizer.lr, precision)."
            )

    def _not_finite(self) -> None:
        skipped, self._unreported = self._unreported, 0
        where = f"{skipped} step(s) up to {self.progress.step} had a gradient that isn't finite"
        policy = self.trainer.on_nonfinite.name
        if policy == "skip":
            self.observer.say(f"{where}: skipped, nothing was updated")
        elif policy == "stop":
            raise TrainingError(
                f"Trainer: {where}. Lower optimizer.lr, or go on over such steps with "
                "trainer.on_nonfinite=skip (trainer.on_nonfinite)."
            )
        else:
            self._roll_back(where)

    def _roll_back(self, where: str) -> None:
        newest = self.keeper.files.newest()
        if newest is None or self.progress.rollbacks >= _MAX_ROLLBACKS:
            why = "there is no checkpoint to go back to" if newest is None else f"after {_MAX_ROLLBACKS} rollbacks"
            raise TrainingError(
                f"Trainer: {where}, {why}. Lower optimizer.lr, or write checkpoints more often "
                "(optimizer.lr, checkpoint.every)."
            )
        came_to = self.progress
        self.progress, _ = self.keeper.load(newest)
        self._saved_at = self.progress.step
        # What was consumed stays consumed: going over the same samples would end in the same place.
        self.progress.samples, self.progress.tokens = came_to.samples, came_to.tokens
        self.progress.skipped, self.progress.rollbacks = came_to.skipped, came_to.rollbacks + 1
        self.total_steps, self.limit = self.parts.limits.steps_in_all(self.progress)
        self.observer.rolled_back(self.progress)
        self.observer.say(f"{where}: back to step {self.progress.step}, going on with the samples after those")

    def evaluate(self, limit: int | None) -> None:
        """Evaluate on the same `limit` validation samples each time; None: on all."""
        if not self.parts.data.validation:
            return
        self._evaluation_due = False
        try:
            with self.clock.measure("evaluation"):
                found = {f"val_{name}": value for name, value in self._evaluated(limit).items()}
                if self.average is not None:
                    with self.average.swapped(self.keeper.weights(), self.keeper.compute_with):
                        found |= {f"ema_val_{name}": value for name, value in self._evaluated(limit).items()}
        except EvaluationStopped:
            self._evaluation_due = True
            return
        self._evaluated_at = None if limit is not None else self.progress.step
        self._fresh |= found
        self.metrics |= found
        self.observer.evaluated(self.progress, found)
        self._call_hooks("on_evaluate")

    def _evaluated(self, limit: int | None) -> dict[str, float]:
        samples, world = self.parts.data.validation, self.world
        assert samples is not None
        batches = evaluation_batches(
            samples,
            self.trainer.collate,
            micro_batch=self.parts.plan.micro_batch,
            data_rank=world.data_rank,
            data_size=world.data_size,
            seed=self.job.seed,
            limit=limit,
            workers=workers_of(self.job),
        )
        chosen = len(samples) if limit is None else min(limit, len(samples))
        shown = self.observer.evaluating(batches, -(-chosen // (world.data_size * self.parts.plan.micro_batch)))
        wanted = until_stopped(shown, world, self.request)
        return evaluate_batches(self.strategy, self.model, world, wanted, self._scored)

    def _scored(self, outputs: object, batch: Batch) -> LossTerms:
        terms = self.trainer.loss(outputs, batch)
        terms.metrics = {**terms.metrics, **self.trainer.metrics(outputs, batch)}
        return terms

    def save(self) -> None:
        """Write a checkpoint, unless this very step has one."""
        if self._saved_at == self.progress.step:
            return
        with self.clock.measure("checkpoint"), self.observer.saving():
            self._keep(self.keeper.save)
        self._saved_at = self.progress.step
        self._note_saved()

    def commit(self, *, now: bool = False) -> None:
        """Where ranks may be lost and others go on: keep in memory what they go on from, if it is time."""
        elastic = self.world.elastic
        if elastic is not None and (now or self.due(elastic.commit_every)):
            with self.clock.measure("checkpoint"):
                self._keep(self.keeper.commit)

    def _keep(self, write: Callable[..., None]) -> None:
        self._read_skips()
        self.progress.seconds += self.clock.lap()
        recent, due = self._continuity.recent, self._evaluation_due
        write(self.progress, metrics=self._fresh, recent=recent, evaluation_due=due)

    def _note_saved(self) -> None:
        """Say so once a checkpoint is complete."""
        saved = self.keeper.finished()
        if saved is None:
            return
        self.observer.saved(saved.step, seconds=saved.seconds, stall_s=saved.stall_s, num_bytes=saved.num_bytes)
        background = f", training waited {saved.stall_s:.2f} s" if saved.stall_s < saved.seconds else ""
        self.observer.say(f"checkpoint at step {saved.step} ({saved.seconds:.2f} s{background})")
        if not self._warned_of_copies and (copies := self.keeper.files.staged_bytes):
            self._warned_of_copies = True
            self.observer.say(
                f"copies for saving in the background take {copies / 2**20:.0f} MiB of this rank's memory"
            )
        if saved.seconds > self.request.grace_s and not self._warned:
            self._warned = True
            self.observer.say(
                f"that is longer than the {self.request.grace_s:.0f} s that a signal leaves before the kill: "
                "write checkpoints more often, or ask for more time (checkpoint.every, trainer.grace)"
            )

    def finish(self) -> Outcome:
        """Write the last checkpoint, evaluate on everything, and say how it went."""
        assert self.reason is not None
        if self.progress.step > 0:
            self.save()  # first, since somebody who waits for the rest may lose patience
            with self.clock.measure("checkpoint"):
                self.keeper.files.wait()
                self.keeper.files.tidy()
            self._note_saved()
        if not self._stopped:
            if self.progress.step == self._begun_at and self.observer.has_finished(self.progress.step):
                self.observer.say(f"nothing left to do: {self.reason}; raise the limit to go on")
            else:
                if self._evaluated_at != self.progress.step:
                    self.evaluate(None)
                if self._evaluation_due:
                    self.reason, self._stopped = "stopped during the last evaluation", True
                else:
                    self._call_hooks("on_end")
        self.observer.finish(self.progress, self.reason, stopped=self._stopped)
        return Outcome(progress=self.progress, reason=self.reason, stopped=self._stopped, metrics=self.metrics)

    def _call_hooks(self, name: str) -> None:
        if not self.job.hooks:
            return
        moment = Moment(
            progress=self.progress,
            metrics=self.metrics,
            world=self.world,
            folder=self.job.folder,
            predict=beating(lambda batch: self.strategy.predict(self.model, batch.to(self.world.device))),
            tokenizer=self.parts.data.tokenizer,
            say=self.observer.say,
            log_text=lambda title, text: self.observer.text(self.progress.step, title, text),
            continues=self.trainer.task is None or self.trainer.task.continues,
        )
        with self.clock.measure("hooks"):
            for hook in self.job.hooks.values():
                reason = getattr(hook, name)(moment)
                self._wish = self._wish or reason
