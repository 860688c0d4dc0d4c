"""Many jobs through one launcher, so many at a time: start, look, stop; a command that is killed loses nothing."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from strategies.errors import ConfigError
from trainer.launch.base import ArrayLauncher, LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.launch.book import Book, Entry, Objective, Standing
from trainer.launch.search import Search
from trainer.stop import EXIT_STOPPED

_SAME_STOP_S = 2.0
"""As in the jobs themselves: signals within two seconds count as one."""
_LEAVE_S = 15.0
"""How long jobs that were told to end at once are waited for."""
_SAVE_S = 5.0
_TOLD = ("stopping the jobs that run, each with a checkpoint; again: at once", "ending the jobs at once")
_ENDS = {State.finished: Standing.finished, State.stopped: Standing.stopped, State.failed: Standing.failed}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the jobs of a sweep share."""

    script: Path
    fixed: tuple[str, ...]
    """Words for every job."""
    objective: Objective
    rerun_failed: bool = False

    def job(self, folder: Path, entry: Entry) -> LaunchJob:
        """As a launcher takes it; `folder` is the sweep's."""
        overrides = (*self.fixed, *entry.words)
        return LaunchJob(name=entry.name, script=self.script, overrides=overrides, folder=folder / entry.name)

    def to_do(self, entry: Entry) -> bool:
        """Whether this command has something to do with it."""
        left = (Standing.waiting, Standing.running, Standing.stopped)
        return entry.standing in left or (self.rerun_failed and entry.standing is Standing.failed)


class Sweep:
    """The jobs of a book, and those that a search adds to them."""

    def __init__(
        self,
        plan: Plan,
        book: Book,
        search: Search,
        launcher: Launcher,
        show: Callable[[Sequence[Entry]], None],
        say: Callable[[str], None],
        poll_s: float = 1.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            plan: what the jobs share.
            book: holds what is known of them.
            search: says which to try.
            launcher: starts them.
            show: is told after each look at them.
            say: tells people one thing.
            poll_s: seconds between two looks.
        """
        self._plan, self._book, self._search, self._launcher, self._show = plan, book, search, launcher, show
        self._say, self._poll_s = say, poll_s
        self._to_do = [entry for entry in book.entries if plan.to_do(entry)]
        self._running: dict[str, LaunchedJob] = {}
        self._entries = {entry.name: entry for entry in book.entries}
        self._asked: list[float] = []
        """When somebody asked to stop."""
        self._passed_on = 0
        self._saved: list[tuple[Standing, bool]] = []
        self._saved_at = 0.0

    def run(self) -> int:
        """Until all are over, or somebody asks to stop.

        Returns:
            0: all finished, but for those that weren't worth it; 1: some failed; 75: some have still to go on.
        """
        with self._listening():
            try:
                self._find_again()
                while True:
                    self._look()
                    self._pass_on()
                    self._fill()
                    self._save()
                    self._show(self._book.entries)
                    if self._done():
                        break
                    self._wait()
            finally:
                self._book.save()
        return self._exit_code()

    def _save(self) -> None:
        standings = [(entry.standing, entry.pruning) for entry in self._book.entries]
        if standings != self._saved or time.monotonic() - self._saved_at > _SAVE_S:
            self._book.save()
            self._saved, self._saved_at = standings, time.monotonic()

    def _wait(self) -> None:
        """Until the next look; not longer than it takes to hear somebody."""
        heard, end = len(self._asked), time.monotonic() + self._poll_s
        while len(self._asked) == heard and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _find_again(self) -> None:
        """Those that an earlier command has started go on by themselves, or have come to an end."""
        for entry in [entry for entry in self._to_do if entry.standing is Standing.running]:
            job = self._launcher.find(self._plan.job(self._book.folder, entry), entry.handle or "")
            if job is None:
                entry.standing = Standing.stopped
                continue
            self._to_do.remove(entry)
            self._running[entry.name] = job
            self._look_at(entry, job)
            if entry.name not in self._running and self._plan.to_do(entry):
                self._to_do.insert(0, entry)

    def _look(self) -> None:
        for name, job in list(self._running.items()):
            self._look_at(self._entries[name], job)

    def _look_at(self, entry: Entry, job: LaunchedJob) -> None:
        status = job.status()
        if status.metrics:
            entry.metrics = dict(status.metrics)
            self._note_curves(entry, status)
        if status.state.over:
            entry.standing, entry.detail = _ENDS[status.state], status.detail
            if entry.pruning and entry.standing is Standing.stopped:
                entry.standing = Standing.pruned
            del self._running[entry.name]
            self._search.over(entry)
            return
        entry.seconds = entry.before_s + time.time() - entry.begun
        if not entry.pruning and self._search.hopeless(entry):
            entry.pruning = True
            job.stop()

    def _note_curves(self, entry: Entry, status: Status) -> None:
        for name in self._plan.objective.candidates():
            if name in status.curves:
                entry.curves[name] = dict(status.curves[name])
            elif name in entry.metrics and "step" in entry.metrics:
                entry.curves.setdefault(name, {})[int(entry.metrics["step"])] = entry.metrics[name]

    def _fill(self) -> None:
        if isinstance(self._launcher, ArrayLauncher) and len(self._to_do) > 1 and not self._asked:
            self._start_array(self._launcher)
        most = self._launcher.at_once
        while not self._asked and (most is None or len(self._running) < most):
            entry = self._to_do.pop(0) if self._to_do else self._asked_search()
            if entry is None:
                return
            self._start(entry)

    def _asked_search(self) -> Entry | None:
        entry = self._search.ask()
        if entry is not None:
            self._book.entries.append(entry)
            self._entries[entry.name] = entry
        return entry

    def _start_array(self, launcher: ArrayLauncher) -> None:
        """All that are known; an error is everybody's, and ends the sweep."""
        entries, self._to_do = self._to_do, []
        jobs = launcher.start_array([self._plan.job(self._book.folder, entry) for entry in entries])
        for entry, job in zip(entries, jobs, strict=True):
            self._begin(entry)
            self._is_running(entry, job)
        self._book.save()  # at once: they must be found again whatever happens now

    def _begin(self, entry: Entry) -> None:
        entry.before_s, entry.begun, entry.detail = entry.seconds, time.time(), ""

    def _is_running(self, entry: Entry, job: LaunchedJob) -> None:
        self._running[entry.name] = job
        entry.standing, entry.handle = Standing.running, job.handle

    def _start(self, entry: Entry) -> None:
        self._begin(entry)
        try:
            job = self._launcher.start(self._plan.job(self._book.folder, entry))
        except ConfigError as error:
            entry.standing, entry.detail = Standing.failed, f"ConfigError: {error}"
            self._search.over(entry)
            return
        self._is_running(entry, job)
        self._book.save()  # at once: it must be found again whatever happens now

    def _pass_on(self) -> None:
        """To the jobs, that somebody asked to stop."""
        if self._passed_on < min(2, len(self._asked)):
            self._passed_on += 1
            if self._running:
                self._say(_TOLD[self._passed_on - 1])
            for job in self._running.values():
                job.stop()

    def _done(self) -> bool:
        if not self._running:
            return bool(self._asked) or not self._to_do
        return len(self._asked) > 1 and time.monotonic() - self._asked[1] > _LEAVE_S

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def heard(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._asked or now - self._asked[-1] > _SAME_STOP_S:
                self._asked.append(now)

        before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> int:
        """How often somebody asked to stop."""
        return len(self._asked)

    def _exit_code(self) -> int:
        untried = len(self._book.entries) < self._search.total
        if self._asked and (untried or any(self._plan.to_do(entry) for entry in self._book.entries)):
            return EXIT_STOPPED
        standings = {entry.standing for entry in self._book.entries}
        if Standing.failed in standings:
            return 1
        return EXIT_STOPPED if standings & {Standing.stopped, Standing.running} else 0
