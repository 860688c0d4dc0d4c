"""Communication on an accelerator, from the kernels of single steps.

On CPU the strategies measure every step themselves. On an accelerator the host only queues work, and asking when each
piece of it ran would make it wait. So single steps are recorded by torch's profiler, device activity alone, and what
communicates is held against what computes at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import DeviceType

from strategies.timing import length, outside
from strategies.world import World
from trainer.metrics.clock import StepClock

_FIRST = 5
"""Steps of this start after which the first sample is taken: compiled, allocated and connected by then."""
_COMMUNICATES = re.compile(r"nccl|rccl|smddp", re.IGNORECASE)
_COPIES = re.compile(r"Memcpy (HtoD|DtoH)", re.IGNORECASE)
_NOTHING = contextlib.nullcontext()


class CommunicationSample:
    """Watches a step now and then, and tells the clock what it has seen."""

    def __init__(self, world: World, clock: StepClock, say: Callable[[str], None]) -> None:
        """Nothing is watched where the strategy knows: on CPU, and where there is nobody to talk to."""
        self._on: bool = world.device.type != "cpu" and world.size > 1
        self._clock, self._say = clock, say
        self._taken = 0

    def around(self, every: int | None) -> AbstractContextManager[Any]:
        """Around a step: watched if its time has come, one step in `every`; None: never."""
        if every is None or not self._on:
            return _NOTHING
        self._taken += 1
        due = self._taken == _FIRST or self._taken % every == 0
        return self._watched() if due and not torch._C._autograd._profiler_enabled() else _NOTHING

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it starts and stops
        with self._clock.measure("hooks"), self._giving_up():
            watching = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
            watching.start()
        if not self._on:
            yield
            return
        try:
            yield
        except BaseException:
            watching.stop()
            raise
        torch.cuda.synchronize()  # still the step's own time
        with self._clock.measure("hooks"), self._giving_up():
            watching.stop()
            assert watching.profiler is not None
            results = watching.profiler.kineto_results
            assert results is not None
            found = communication_s(
                (event.name(), event.start_ns(), event.end_ns())
                for event in results.events()
                if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
            )
            if found is None:
                raise RuntimeError("the profiler sees no kernels (perhaps another program has taken it)")
            self._clock.sampled = found

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Whatever goes wrong in here is told, and the run goes on without."""
        try:
            yield
        except Exception as error:
            self._on, self._clock.sampled = False, None
            self._say(f"communication isn't measured: {error} (trainer.communication_every)")


def communication_s(events: Iterable[tuple[str, int, int]]) -> tuple[float, float] | None:
    """Seconds of communication: while nothing computed, and in all; None if there is nothing to go by.

    Args:
        events: what ran on the device: its name, begin and end in nanoseconds.
    """
    sent: list[tuple[float, float]] = []
    computed: list[tuple[float, float]] = []
    for name, begin, end in events:
        if _COMMUNICATES.search(name):
            sent.append((begin, end))
        elif not _COPIES.search(name):
            computed.append((begin, end))
    if not sent and not computed:
        return None
    return outside(sent, computed) * 1e-9, length(sent) * 1e-9
