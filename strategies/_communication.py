"""How long a rank's steps are in communication on CPU, and how long they wait for it.

Python's way to a collective is a function of `torch.distributed`: FSDP, DeepSpeed and we ourselves call it by name, so
inside a step these names lead to functions that look at the clock first. DistributedDataParallel calls from C++ and is
heard in torch's dispatcher. An accelerator's own clock is another one: nothing is measured here then.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from strategies.timing import Span, length
from strategies.world import World

_COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv", "isend", "irecv"),
    *("all_gather", "all_gather_single", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce_coalesced"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "all_to_all", "all_to_all_single"),
)
_FROM_CPP = ("allreduce_", "broadcast_")  # what DistributedDataParallel and its hooks call

S = TypeVar("S", bound="_Measured")
P = ParamSpec("P")
R = TypeVar("R")


_IN_STEP: dict[int, CommunicationClock] = {}
"""Threads that are in a step which is measured."""


class CommunicationClock:
    """Used as a context around the parts of a step; only the thread that entered it is measured.

    Communication lasts from the call to its end on this rank, the wait for late ranks included. What is under way at
    the same time counts once. Exposed is what the rank waited for; the rest went on behind its computing.
    """

    def __init__(self, world: World) -> None:
        self._alone = world.size == 1
        self._on = world.device.type == "cpu" and not self._alone
        self._depth = 0
        self._waited: list[Span] = []
        self._sent: list[Span] = []
        self._flights: list[_Flight] = []
        self._under_way: queue.SimpleQueue[_Flight | None] | None = None
        self._plain: dict[str, Callable[..., Any]] = {}
        self._timed: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> None:
        self._depth += 1
        if self._on and self._depth == 1:
            if not self._timed:
                self._plain = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}
                self._timed = {name: self._timing(function) for name, function in self._plain.items()}
            _IN_STEP[threading.get_ident()] = self
            vars(dist).update(self._timed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._on and self._depth == 0:
            vars(dist).update(self._plain)
            _IN_STEP.pop(threading.get_ident(), None)
            for flight in self._flights:
                work = flight.work
                if flight.end is None and work is not None and _is_over(work):
                    flight.end = time.perf_counter()  # the other thread hasn't come to it

    def take(self) -> tuple[float | None, float | None]:
        """Seconds since the last call: exposed, and in all. None where an accelerator communicates."""
        if self._alone:
            return 0.0, 0.0
        if not self._on:
            return None, None
        flights, self._flights = self._flights, []
        for flight in flights:
            if (end := flight.end) is None:
                self._flights.append(flight)
            else:
                (self._waited if flight.awaited else self._sent).append((flight.begin, end))
        exposed, whole = length(self._waited), length([*self._waited, *self._sent])
        self._waited, self._sent = [], []
        return exposed, max(exposed, whole)  # which rounding may have made the larger one

    @property
    def listens(self) -> bool:
        """Whether this thread is in a step, and measured."""
        return _IN_STEP.get(threading.get_ident()) is self

    def waited(self, begin: float) -> None:
        """This rank has waited since `begin`, of `time.perf_counter`, for communication that begun then or earlier."""
        self._waited.append((begin, time.perf_counter()))

    def sent(self, begin: float) -> None:
        """Communication that began at `begin` is over, and perhaps nobody has waited for it."""
        self._sent.append((begin, time.perf_counter()))

    def follow(self, begin: float, work: dist.Work, *, awaited: bool = False) -> None:
        """Note when `work`, which began at `begin`, is over; in a thread of its own, which does nothing but wait.

        Args:
            begin: of `time.perf_counter`.
            work: under way.
            awaited: this rank does nothing else until then.
        """
        if self._under_way is None:
            self._under_way = queue.SimpleQueue()
            name = "shardwright-communication"
            threading.Thread(target=_follow, args=(self._under_way,), name=name, daemon=True).start()
            weakref.finalize(self, self._under_way.put, None)
        self._flights.append(flight := _Flight(begin, work, awaited))
        self._under_way.put(flight)

    def _timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.listens:
                return function(*args, **kwargs)
            begin = time.perf_counter()
            work = function(*args, **kwargs)
            if not isinstance(work, dist.Work):
                self.waited(begin)
                return work
            self.follow(begin, work)
            return _Handle(work, self)

        return timed


@dataclass(slots=True)
class _Flight:
    begin: float
    work: dist.Work | None
    """None: it is over; its tensors may be large, and aren't to live until the end of the step for this."""
    awaited: bool
    end: float | None = None


def _is_over(work: dist.Work) -> bool:
    if work.is_completed():
        return True
    with contextlib.suppress(RuntimeError):  # not every kind has one
        return work.get_future().done()  # in Gloo a moment earlier
    return False


def _follow(under_way: queue.SimpleQueue[_Flight | None]) -> None:
    while (flight := under_way.get()) is not None:
        work = flight.work
        assert work is not None
        with contextlib.suppress(Exception):  # whoever waits for it in the step hears why
            work.wait()
        flight.end = flight.end or time.perf_counter()
        flight.work = None
        del flight, work


class _Handle(dist.Work):
    """A work whose waits are timed; in all else the work itself."""

    def __init__(self, work: dist.Work, clock: CommunicationClock) -> None:
        super().__init__()
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        begin = time.perf_counter()
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            if self._clock.listens:
                self._clock.waited(begin)


def _handed_on(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self._work, name)(*args, **kwargs)


for _name in dir(dist.Work):
    if _name not in vars(_Handle) and not _name.startswith(("__", "_pybind")):
        setattr(_Handle, _name, _handed_on(_name))


class ReducerWatch:
    """While one of these lives, what DistributedDataParallel sends is heard, though it does so from C++."""

    def __init__(self) -> None:
        library = _LIBRARIES.get("c10d")  # a next model is wrapped before the last one is gone
        if library is None:
            library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
            for name in _FROM_CPP:
                # It waits at once for what it broadcasts: buffers, and how gradients are put together.
                called = _followed(getattr(torch.ops.c10d, name).default, awaited=name == "broadcast_")
                library.impl(name, called, "AutogradCPU", with_keyset=True)  # type: ignore[no-untyped-call]
            _LIBRARIES["c10d"] = library
        self._library = library


_LIBRARIES: weakref.WeakValueDictionary[str, torch.library.Library] = weakref.WeakValueDictionary()


def _followed(operator: Any, *, awaited: bool) -> Callable[..., Any]:
    below = torch._C._after_autograd_keyset

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        clock = _IN_STEP.get(threading.get_ident())
        begin = time.perf_counter()
        results = operator.redispatch(keys & below, *args, **kwargs)
        if clock is not None:
            clock.follow(begin, dist.Work.unbox(results[1]), awaited=awaited)
        return results

    return call


class _Measured(Protocol):
    @property
    def _clock(self) -> CommunicationClock: ...


def measured(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that is a part of a step."""

    @functools.wraps(method)
    def inside(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._clock:
            return method(self, *args, **kwargs)

    return inside
