"""What is slow to make and follows from its inputs alone: made once, kept on disk under a hash of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.world import World
from trainer.data.base import Say
from trainer.pulse import PULSE

_FORMAT = 1
_META = "meta.json"
_BLOCK_BYTES = 1 << 16
_MOST_BLOCKS = 1024
_REPORT_S = 30.0
_WAIT = timedelta(days=7)  # as long as the largest data set takes
_occasions = itertools.count()


def on_first_rank(world: World, work: Callable[[], Any]) -> Any:
    """Do `work` on one rank of each machine; its result on every rank, or its error on every rank.

    Nobody waits inside a collective meanwhile, so none times out.

    Args:
        world: all its ranks call this.
        work: returns a JSON value, which must be the same on each machine.

    Raises:
        ConfigError: `work` raised it on some machine, or two machines came to different results
            (they see different files).
    """
    leader = world.rank - world.local_rank
    heard = world.gather([leader, next(_occasions)])
    leaders = sorted({rank for rank, _ in heard})
    occasion = f"data/{heard[0][1]}"  # rank 0's count: processes may have had different lives before this run

    def publish() -> None:
        try:
            world.store.set(f"{occasion}/{leader}", json.dumps({"value": work()}))
        except Exception as error:
            kind = "ConfigError" if isinstance(error, ConfigError) else type(error).__name__
            world.store.set(f"{occasion}/{leader}", json.dumps({"error": str(error), "kind": kind}))
            raise

    world.first(occasion, publish)
    answers = []
    for rank in leaders:
        world.store.wait([f"{occasion}/{rank}"], _WAIT)
        answers.append(json.loads(world.store.get(f"{occasion}/{rank}")))
    for rank, answer in zip(leaders, answers, strict=True):
        if "error" in answer:
            known = answer["kind"] == "ConfigError"
            raise ConfigError(answer["error"]) if known else RuntimeError(f"rank {rank}: {answer['error']}")
    for rank, answer in zip(leaders, answers, strict=True):
        if answer != answers[0]:
            raise ConfigError(
                f"Data: the machines of ranks {leaders[0]} and {rank} read different data. "
                "Give every machine the same files (data)."
            )
    return answers[0]["value"]


def file_digest(path: Path) -> str:
    """A hash of a file's whole content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of up to 64 MiB of it in blocks spread over it, for files of any size."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    blocks = -(-size // _BLOCK_BYTES)
    step = max(1, blocks / _MOST_BLOCKS)
    with path.open("rb") as file:
        for number in range(min(blocks, _MOST_BLOCKS)):
            file.seek(int(number * step) * _BLOCK_BYTES)
            digest.update(file.read(_BLOCK_BYTES))
        file.seek(max(0, size - _BLOCK_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


class Cache:
    """A folder of entries, each complete or absent."""

    def __init__(self, folder: Path) -> None:
        """Open it, or make it.

        Raises:
            ConfigError: it can't be written to.
        """
        self._folder = folder
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass

    def entry(self, kind: str, key: Any, make: Callable[[Path], None]) -> Path:
        """The folder of the entry for `key`; made by `make(folder)` where it is absent or damaged.

        Several processes, also on several machines that share the folder, may ask at once: where
        locks work one makes it, elsewhere each does and the first to finish is kept.

        Args:
            kind: the first part of its name, for people.
            key: JSON value from which the content follows.
            make: writes files into a fresh folder.
        """
        text = json.dumps([_FORMAT, kind, key], sort_keys=True)
        name = f"{kind}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
        target = self._folder / name
        if _is_whole(target):
            return target
        with _writable(self._folder), _locked(self._folder / f"{name}.lock") as alone:
            if _is_whole(target):
                return target
            if alone:  # then these are of processes that were killed
                for leftover in self._folder.glob(f".{name}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            self._remove(target)
            fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self._folder))
            try:
                fresh.chmod(0o755)
                make(fresh)
                _seal(fresh)
                self._publish(fresh, target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        return target

    def _remove(self, target: Path) -> None:
        """Take a damaged entry away; renamed first, so that nobody meets it half removed."""
        if target.exists():
            grave = Path(tempfile.mkdtemp(prefix=".damaged-", dir=self._folder))
            with contextlib.suppress(FileNotFoundError):
                target.rename(grave / target.name)
            shutil.rmtree(grave, ignore_errors=True)

    @staticmethod
    def _publish(fresh: Path, target: Path) -> None:
        try:
            fresh.rename(target)
        except OSError:
            if not _is_whole(target):  # else somebody else was quicker, with the same content
                raise


def _seal(folder: Path) -> None:
    """Write last what tells a complete entry from a half-written one."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = fingerprint(path)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    (folder / _META).write_text(json.dumps({"files": files}, indent=1))


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / _META).read_text())["files"]
        return all(fingerprint(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Data: the cache folder {folder} can't be written: {error.strerror or error}. "
            "Free it, or choose another (cache)."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock while others wait; without one (false) where the file system has none."""
    from filelock import FileLock

    lock = FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Report:
    """Tells one person how far a long piece of work is: a bar on a terminal, else a line now and then."""

    def __init__(self, what: str, total: int | None, say: Say, shown: bool) -> None:
        """Begin.

        Args:
            what: such as "Tokenising".
            total: units of work; None: not known.
            say: used where stderr is no terminal.
            shown: false on all ranks but one.
        """
        self._what, self._total, self._say, self._shown = what, total, say, shown
        self._done = 0
        self._next = time.monotonic() + _REPORT_S
        self._bar = self._make_bar() if shown and sys.stderr.isatty() else None

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        bar.add_task(self._what, total=self._total)
        return bar

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """That much more is done."""
        self._done += amount
        PULSE.beat()
        if self._bar is not None:
            self._bar.advance(0, amount)
        elif self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_S
            of = "" if self._total is None else f" of {self._total:,}"
            self._say(f"{self._what}: {self._done:,}{of}")


MakeReport = Callable[[str, "int | None"], Report]
"""`make_report(what, total)`."""


def reporter(world: World, say: Say) -> MakeReport:
    """Reports for the person who watches rank 0."""
    return functools.partial(Report, say=say, shown=world.rank == 0)
