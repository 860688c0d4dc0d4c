"""Gradients on their way through Horovod."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from strategies._communication import CommunicationClock
from strategies._horovod_start import library
from strategies.errors import ConfigError

_USED = "which of them were used"  # no parameter's name
_KNOWN = (torch.float16, torch.float32, torch.float64)


class Reducer:
    """Sends each gradient off as soon as backward has it, and waits for all of them at its end.

    A parameter that this rank didn't use travels as zeros, since another rank may have used it; what no rank has used
    is left without a gradient, as in one process.

    Args:
        model: with its parameters in place, where this rank computes.
        average: add up, then divide; else divide, then add up.
        adasum: Adasum instead of a sum.
        fp16: let fp16 travel.
        clock: is told when each gradient was on its way.

    Raises:
        ConfigError: Horovod can't send gradients of that dtype.
    """

    def __init__(self, model: nn.Module, *, average: bool, adasum: bool, fp16: bool, clock: CommunicationClock) -> None:
        self._horovod = library()
        self._fp16 = fp16
        self._op = self._horovod.Adasum if adasum else self._horovod.Average if average else self._horovod.Sum
        self._scale = 1.0 if average or adasum else 1.0 / self._horovod.size()
        self._adasum = adasum
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for name, value in self._trained.items():
            if value.dtype not in _KNOWN:
                raise ConfigError(
                    f"HorovodStrategy: the parameter {name!r} is {value.dtype}, which Horovod can't reduce. "
                    "Train fp32 weights, with precision=bf16 around them (precision), or use strategy=ddp (strategy)."
                )
        self._clock = clock
        self._under_way: dict[str, tuple[int, Tensor]] = {}
        self._begun: dict[int, float] = {}  # handles that aren't known to be done, in order
        self._sending = False
        self._hooks = [
            value.register_post_accumulate_grad_hook(functools.partial(self._ready, name))  # type: ignore[no-untyped-call]
            for name, value in self._trained.items()
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Around the backward whose gradients are complete."""
        self._under_way.clear()
        self._begun.clear()
        self._sending = True
        try:
            with self._connected():
                yield
        finally:
            self._sending = False

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Inside, a rank that is gone is heard of in words that say so."""
        try:
            yield
        except self._horovod.HorovodInternalError as error:
            raise RuntimeError(f"Horovod: the connection between the ranks broke: {error}") from error

    def _ready(self, name: str, parameter: nn.Parameter) -> None:
        if self._sending:
            if name in self._under_way:
                raise RuntimeError(
                    f"the parameter {name!r} got a gradient twice in one backward, the first of which has been sent"
                )
            self._send(name, parameter)
            self._note_done()

    def _note_done(self) -> None:
        """Seen whenever a gradient is ready, so in time by that much; handles that come first are done first."""
        while self._begun and self._horovod.poll(handle := next(iter(self._begun))):
            self._clock.sent(self._begun.pop(handle))

    def _send(self, name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        sent = parameter.grad.half() if self._fp16 else parameter.grad
        self._under_way[name] = self._start(sent, name), sent

    def _start(self, sent: Tensor, name: str) -> int:
        begin = time.perf_counter()
        handle: int = self._horovod.allreduce_async_(sent, name=name, op=self._op, prescale_factor=self._scale)
        self._begun[handle] = begin
        return handle

    def wait(self) -> None:
        """Until every gradient is complete.

        Raises:
            RuntimeError: the connection to another rank broke.
        """
        unused = [name for name, value in self._trained.items() if value.grad is None]
        with self._connected():
            self._note_done()
            handle, counts = self._count(unused)
            for name, value in self._trained.items():
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                if name not in self._under_way:  # perhaps used, but not by the last micro-batch
                    self._send(name, value)
            for name, (each, sent) in self._under_way.items():
                self._synchronize(each)
                gradient = self._trained[name].grad
                assert gradient is not None
                if sent is not gradient:
                    gradient.copy_(sent)
            self._synchronize(handle)
        self._under_way.clear()
        for name, count in zip(self._trained, counts.tolist(), strict=True) if unused else ():
            if count == 0:
                self._trained[name].grad = None

    def _synchronize(self, handle: int) -> None:
        self._horovod.synchronize(handle)
        if (begin := self._begun.pop(handle, None)) is not None:
            self._clock.sent(begin)

    def _count(self, unused: list[str]) -> tuple[int, Tensor]:
        """Start to count who used what. It travels as the gradients do, so that it travels with them."""
        first = next(iter(self._trained.values()))
        used = torch.ones(len(self._trained), dtype=torch.float16 if self._fp16 else first.dtype, device=first.device)
        if unused:
            used[[list(self._trained).index(name) for name in unused]] = 0
        if self._adasum:
            return self._horovod.allreduce_async_(used, name=_USED, op=self._horovod.Sum), used
        return self._start(used, _USED), used
