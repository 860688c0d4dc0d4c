"""The time before the ranks are connected, when one that fails must not leave the others waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError

_SLICE = timedelta(seconds=2)
_SAID, _FELL = "said", "fell"


@dataclass
class Meeting:
    """Of this process."""

    limit_s: float = 600.0
    """How much later than this rank another one may come."""


MEETING = Meeting()


def fall(store: dist.Store, rank: int, why: str) -> None:
    """Let ranks that still wait for this one know that it doesn't come."""
    store.set(_FELL, f"rank {rank}: {why}")


def wait_for(store: dist.Store, keys: Sequence[str], who: Callable[[], str]) -> None:
    """Wait until `keys` are set by other ranks, as long as no rank has failed.

    Args:
        store: that all ranks share.
        keys: of it.
        who: says, for people, which ranks would set them.

    Raises:
        ConfigError: another rank has said that the input is wrong.
        TrainingError: another rank has failed, or this one isn't heard of within the meeting's time.
    """
    end = time.monotonic() + MEETING.limit_s
    while True:
        try:
            store.wait(list(keys), _SLICE)
        except dist.DistStoreError as error:
            _raise_what_was_said(store)
            if time.monotonic() > end:
                raise failed_to_meet(who(), "nothing was heard") from error
        else:
            return


def failed_to_meet(who: str, why: object) -> TrainingError:
    """The error of a rank that waits in vain."""
    text = (str(why).splitlines() or ["no reason"])[0].strip().rstrip(".")
    return TrainingError(
        f"Launch: the ranks didn't come together within {MEETING.limit_s:g} s: {who}: {text}. Look at what others "
        "say, and start again, or give them more time (backend.meeting_s)"
    )


def _raise_what_was_said(store: dist.Store) -> None:
    """If a rank that has ended said anything."""
    if store.check([_SAID]):
        kind, _, text = store.get(_SAID).decode().partition(": ")[2].partition(": ")
        raise ConfigError(text) if kind == "ConfigError" else TrainingError(text)
    if store.check([_FELL]):
        raise TrainingError(store.get(_FELL).decode())
