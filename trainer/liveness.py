"""Who is still there, and who still moves: threads of each rank that look after all, so that none waits in vain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from strategies.world import World
from trainer.bounded import within
from trainer.left_behind import see_off
from trainer.metrics.events import note
from trainer.metrics.logs import LOGGER
from trainer.peers import Peer, host_of, store_is_elsewhere, this_machine
from trainer.pulse import PULSE
from trainer.sagemaker.failure import write_failure
from trainer.watchdog import HUNG, Watchdog

_EVERY_S = 1.0
_BEAT_GONE_S = 25.0
"""Without a sign of life from another machine for this long, while this one doesn't get on, it is gone."""
_LEAVE_S = 4.0
"""A rank whose peer is gone gets this long to notice by itself, before it is ended wherever it waits."""
_CLOSING_S = 20.0
"""The same for one that has noticed, and is closing its files."""
_STOP_S = 600.0
"""The same where only the store is gone: time for a last checkpoint."""
_NO_STEP_S = 120.0
"""The same, if nothing gets done in it."""
_SURE_S = 30.0
"""How long rank 0 may be missing where the store can't tell any more whether it left in order."""
_SAY_S = 5.0
"""How long each of the last things may take: a disk or a terminal may be what hangs."""


class Liveness:
    """Watches from entering to leaving the context; does nothing where a process is alone and may take for ever.

    Ranks of the same machine are looked at as processes; of each other machine, one rank's sign of life in the
    store. That is used through a connection of its own and by a thread of its own, which may wait for it as long as a
    cable is broken; and never a collective, since the main thread may be waiting in either. Another thread keeps the
    time, and ends what hangs. A stopped or slow process isn't dead. When a rank is gone, the main threads of the
    others mostly hear of it from their communication library and ask `lost`; one that hangs is ended here.

    Args:
        world: the ranks.
        folder: the run's.
        number: of the run among those of the launch.
        hang_timeout_s: seconds without progress of any rank after which the run has failed; None: however long.
    """

    def __init__(self, world: World, folder: Path, number: int, hang_timeout_s: float | None = None) -> None:
        self._world = world
        self._folder = folder
        self._prefix = f"live/{number}"
        self._failed = f"failed/{number}"
        self._closed, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._peers: dict[int, Peer] = {}
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._count = 0
        self._looked_at = 0.0
        self._answered_at = time.monotonic()
        self._is_elsewhere = False
        self._stopping = False
        self._store_gone_at: float | None = None
        self._verdict: str | None = None
        self._heard: str | None = None
        self._ends_since: float | None = None
        self._failures: set[str] = set()
        self._watchdog = Watchdog(world, folder, hang_timeout_s)

    def __enter__(self) -> Liveness:
        self._main = threading.get_ident()
        PULSE.begin()
        self._watchdog.begin(self._main)
        if self._world.size > 1:
            self._store: Any = self._world.store.clone()  # type: ignore[attr-defined]  # its stubs lack it
            self._set(str(self._world.rank), json.dumps([this_machine(), os.getpid()]))
            self._watchdog.connect(self._store, self._prefix)
            self._start("liveness", self._follow)
        if self._world.size > 1 or self._watchdog.limit_s() is not None:
            self._start("watchdog", self._watch)
        return self

    def _start(self, name: str, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        self._threads[-1].start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.end()
        if self._threads and self._world.size > 1:
            if self._verdict is not None and self._store_is_silent():
                return  # on the way out, too, something may wait for it: the thread ends that
            if self._store_gone_at is None and not self._stopping:
                within(_SAY_S, lambda: self._set(f"left/{self._world.rank}", ""), None)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_LEAVE_S)

    def lost(self, error: Exception) -> str | None:
        """Who is gone, if that is what `error` of this rank comes from; waits a moment to find out.

        None: nobody is, or another rank failed with an error of its own and says so itself.
        """
        if not self._threads or self._world.size == 1 or not is_broken_connection(error):
            return None
        begun = time.monotonic()
        while self._verdict is None and self._heard is None:
            waited = time.monotonic() - begun
            if waited > (_BEAT_GONE_S if self._store_is_silent() else 0) + _LEAVE_S:
                break
            self._wake.set()
            time.sleep(0.1)
        return self._verdict

    def first_words(self, mine: str) -> str:
        """What the first rank that failed said: `mine`, unless there was another."""
        store = self._world.store
        return within(_SAY_S, lambda: store.compare_set(self._failed, "", mine).decode(), "") or mine

    # In the thread that keeps the time. It waits for nothing.

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._closed.wait(self._watchdog.every_s):
            now = time.monotonic()
            if now - looked_at > 5 * _EVERY_S:  # asleep meanwhile
                self._answered_at = now
            looked_at = now
            self._watchdog.stay_awake()
            with self._whatever_fails():
                self._keep_time(now)

    def _keep_time(self, now: float) -> None:
        if self._world.size == 1 or self._store_gone_at is not None or self._store_is_silent():
            self._verdict = self._verdict or self._words_alone(now - self._answered_at)
        words = self._verdict or self._heard
        if words is None:
            return
        if self._ends_since is None:
            self._ends_since = now
            if words.startswith(HUNG):
                self._leave_stacks()
                self._tell(words)
        if now - self._ends_since >= self._patience_s(words):
            self._end(words)

    @contextlib.contextmanager
    def _whatever_fails(self) -> Iterator[None]:
        """Nothing that goes wrong while looking may end the looking, nor the run."""
        try:
            yield
        except Exception as error:
            if repr(error) not in self._failures:
                self._failures.add(repr(error))
                LOGGER.warning("while looking after the ranks", exc_info=True)

    def _patience_s(self, words: str) -> float:
        handled = sys._current_exceptions().get(self._main)
        if handled not in (None, (None, None, None)):
            return _CLOSING_S
        return 2 * self._watchdog.every_s if words.startswith(HUNG) else _LEAVE_S  # each leaves its stacks first

    def _store_is_silent(self) -> bool:
        return self._store_gone_at is None and time.monotonic() - self._answered_at > 5 * _EVERY_S

    def _words_alone(self, silent_s: float) -> str | None:
        """The verdict where the store has nothing to say."""
        if self._is_elsewhere and silent_s > _BEAT_GONE_S and self._watchdog.idle_s() > _BEAT_GONE_S / 2:
            place = os.environ.get("MASTER_ADDR", "rank 0's")
            return (
                f"the machine where the ranks meet ({place}) is gone: nothing was heard of it for {silent_s:.0f} s, so "
                "it is down or stopped, or the network between; start again to go on from the newest checkpoint"
            )
        return self._watchdog.alone(self._stopped(), silent_s)

    def _stopped(self) -> list[int]:
        return [rank for rank, peer in list(self._peers.items()) if peer.is_stopped()]

    # In the thread that talks to the store, and may have to wait for it.

    def _follow(self) -> None:
        self._is_elsewhere = store_is_elsewhere(self._world)
        while not self._closed.is_set():
            with self._whatever_fails():
                self._look()
            self._wake.wait(self._watchdog.every_s)
            self._wake.clear()

    def _look(self) -> None:
        """Once over everything; the verdict is for good."""
        if self._verdict is not None:
            return
        now = time.monotonic()
        if now - self._looked_at > 5 * _EVERY_S:  # asleep meanwhile, and perhaps the others too
            self._beats.clear()
        self._looked_at = now
        if self._store_gone_at is not None:
            self._look_without_store()
            return
        try:
            self._beat()
            self._meet()
            self._look_at_peers()
            self._heard = self._heard or self._failed_elsewhere()
            self._look_for_progress()
            self._answered_at = time.monotonic()
        except (RuntimeError, OSError):  # the store's connection broke: it was with rank 0, or with the launcher
            self._look_without_store()

    def _look_for_progress(self) -> None:
        if self._verdict is None and self._heard is None:
            self._verdict = self._watchdog.ask_around(self._stopped())
        if self._verdict is not None:
            self._store.compare_set(self._failed, "", self._verdict)

    def _beat(self) -> None:
        """Tell the other machines that this one lives."""
        if self._world.local_rank == 0 and self._world.local_size < self._world.size:
            self._count += 1
            self._set(f"beat/{self._world.rank}", str(self._count))

    def _meet(self) -> None:
        """Learn of the ranks of this machine, and of one rank of the next machine."""
        world = self._world
        node = world.rank - world.local_rank
        for rank in {*range(node, min(node + world.local_size, world.size)), (node + world.local_size) % world.size}:
            if rank != world.rank and rank not in self._peers and self._store.check([f"{self._prefix}/{rank}"]):
                self._peers[rank] = Peer.met(*json.loads(self._store.get(f"{self._prefix}/{rank}")))

    def _look_at_peers(self) -> None:
        for rank, peer in self._peers.items():
            gone = peer.is_gone() if peer.is_here else self._is_silent(rank)
            if gone and not self._store.check([f"{self._prefix}/left/{rank}"]):
                self._verdict = self._words(rank, peer)
                return

    def _is_silent(self, rank: int) -> bool:
        """The first rank of another machine hasn't counted on for long, and so long this one hasn't got on either."""
        key, now = f"{self._prefix}/beat/{rank}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        known, since = self._beats.get(rank, (None, now))
        if beat != known or not beat:  # not all send any
            self._beats[rank] = (beat, now)
            return False
        return now - since > _BEAT_GONE_S and self._watchdog.idle_s() > _BEAT_GONE_S / 2

    def _look_without_store(self) -> None:
        """Only the processes of this machine can be seen."""
        self._store_gone_at = self._store_gone_at or time.monotonic()
        missing_s = time.monotonic() - self._store_gone_at
        first = self._peers.get(0)
        hosted_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        is_gone = first is not None and first.is_here and first.is_gone()
        if self._world.elastic is not None:  # also where it only begins again
            self._verdict = "rank 0 is gone, and with it what the ranks share"
            return
        if is_gone and (hosted_it or missing_s > _SURE_S):
            self._verdict = self._words(0, first)
            return
        self._stop("the launcher's store is gone")
        if missing_s > _STOP_S or min(missing_s, self._watchdog.idle_s()) > _NO_STEP_S:
            self._verdict = "the launcher or the machine of rank 0 is gone; start again to go on"

    def _stop(self, why: str) -> None:
        """Ask the loop to stop in order: the ranks' own connections may all be whole."""
        if not self._stopping:
            self._stopping = True
            LOGGER.error("%s: stopping with a checkpoint", why)
            if self._world.rank == 0:
                os.write(2, f"\n{why}\n".encode())
            os.kill(os.getpid(), signal.SIGTERM)

    def _failed_elsewhere(self) -> str | None:
        """What another rank said when it failed."""
        if self._store.check([self._failed]):
            text: str = self._store.get(self._failed).decode()
            return None if text.startswith(f"rank {self._world.rank}:") else text
        return None

    def _words(self, rank: int, peer: Peer | None) -> str:
        again = "start again to go on from the newest checkpoint"
        if peer is not None and not peer.is_here:
            return (
                f"rank {rank} is gone with its machine ({host_of(peer.machine)}): nothing was heard of it for "
                f"{_BEAT_GONE_S:.0f} s, so it is down or stopped, or the network between; {again}"
            )
        log = self._folder / "logs" / f"rank-{rank}.log"
        return (
            f"rank {rank} is gone without a word: killed, perhaps for want of memory (the kernel's log tells). "
            f"Its own log is {log}; {again}"
        )

    def _set(self, key: str, value: str) -> None:
        self._store.set(f"{self._prefix}/{key}", value)

    # The end of a main thread that doesn't come out of its waiting.

    def _end(self, words: str) -> None:
        """Leave, having said why."""
        if not words.startswith(HUNG):
            self._leave_stacks()
        if self._world.elastic is not None:
            self._world.elastic.rejoin("another rank is gone, and it waits in vain")
        if not words.startswith(HUNG):
            self._tell(words)
        if self._is_elsewhere and self._store_is_silent() and self._speaks():
            within(_SAY_S, self._see_launcher_off, None)
        os._exit(1)

    def _see_launcher_off(self) -> None:
        """Ours ends by itself."""
        if "TORCHELASTIC_RUN_ID" in os.environ and "SHARDWRIGHT_LAUNCHER" not in os.environ:
            see_off(os.getppid())

    def _tell(self, words: str) -> None:
        """From one rank, on the console; from each, in its log."""
        line = f"TrainingError: {words}"
        within(_SAY_S, lambda: LOGGER.error(line), None)
        within(_SAY_S, lambda: self._say(line), None)

    def _leave_stacks(self) -> None:
        within(_SAY_S, self._watchdog.write, None)
        for peer in list(self._peers.values()):
            if peer.is_stopped():
                peer.wake()

    def _say(self, line: str) -> None:
        mine, first = f"{self._world.rank}: {line}", None
        if self._world.size > 1 and self._store_gone_at is None and not self._store_is_silent():
            first = within(_SAY_S / 2, lambda: self._store.compare_set("said", "", mine).decode(), None)
        if first == mine or (first is None and self._speaks()):
            os.write(2, f"{line}\n".encode())
            write_failure(line)
        if self._world.rank == 0:
            with contextlib.suppress(OSError):
                note(self._folder, "end", step=PULSE.step, outcome="failed", reason=line)
        sys.stdout.flush()

    def _speaks(self) -> bool:
        """For its machine, where the ranks can't agree on one of them any more."""
        here = [rank for rank, peer in self._peers.items() if peer.is_here and not peer.is_gone()]
        return self._world.rank < min(here, default=self._world.size)


def is_broken_connection(error: Exception) -> bool:
    """Whether `error` is what a rank hears when another one is gone."""
    text = str(error).lower()
    words = ("gloo", "connection", "nccl", "broken pipe", "socket")
    return isinstance(error, dist.DistError) or (
        isinstance(error, (RuntimeError, OSError)) and any(word in text for word in words)
    )
