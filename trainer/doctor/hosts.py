"""Who is there: a roll call through the store, before any rank connects to another."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from strategies.errors import ConfigError, TrainingError
from strategies.world import Launch
from trainer.doctor.check import text_of
from trainer.doctor.findings import listed, plural

_GRACE_S = 4.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rank is on which host. A host is what has a network of its own."""

    names: tuple[str, ...]
    """Of the hosts, all different."""
    called: tuple[str, ...]
    """How each host calls itself."""
    host_of: tuple[int, ...]
    """Each rank's host."""

    def ranks_on(self, host: int) -> list[int]:
        """In order."""
        return [rank for rank, its in enumerate(self.host_of) if its == host]

    @property
    def leaders(self) -> list[int]:
        """The first rank of each host."""
        return [self.ranks_on(host)[0] for host in range(len(self.names))]

    def name_of(self, rank: int) -> str:
        """`rank 3 (algo-2)`."""
        return f"rank {rank} ({self.names[self.host_of[rank]]})"


def this_host() -> list[str]:
    """What the ranks of a host have in common, and no others."""
    network = ""
    with contextlib.suppress(OSError):
        network = str(Path("/proc/self/ns/net").readlink())
    return [socket.gethostname(), text_of("/proc/sys/kernel/random/boot_id") or "", network]


def roll_call(
    store: dist.Store, launch: Launch, wait_s: float, address: str | None, ready: Callable[[], None]
) -> Layout:
    """Wait until every rank has said where it is.

    Args:
        store: keys of this examination alone.
        launch: of this rank.
        wait_s: how long the last one may take.
        address: of this host, where hosts may have the same name.
        ready: called on rank 0; what it refuses, all ranks refuse.

    Raises:
        ConfigError: `ready` raised it.
        TrainingError: some rank never came; the same line on all that did.
    """
    store.set(f"here/{launch.rank}", json.dumps([*this_host(), address]))
    if launch.rank == 0:
        store.set("layout", json.dumps(_gathered(store, launch.size, wait_s, ready)))
    try:
        store.wait(["layout"], timedelta(seconds=wait_s + _GRACE_S))
        found = json.loads(store.get("layout"))
    except RuntimeError as error:
        raise TrainingError(
            f"doctor: rank 0 was not there within {wait_s:.0f} s. See what it says, and whether it was started."
        ) from error
    if "refused" in found or found["missing"]:
        _heard(store, launch, found.get("missing", []))
    if "refused" in found:
        raise ConfigError(found["refused"])
    if missing := found["missing"]:
        one = len(missing) == 1
        raise TrainingError(
            f"doctor: {'rank' if one else 'ranks'} {listed(missing)} of {launch.size} {'was' if one else 'were'} not "
            f"there within {wait_s:.0f} s. See whether each was started, and what it says (--wait)."
        )
    return Layout(**{key: tuple(found[key]) for key in ("names", "called", "host_of")})


def _gathered(store: dist.Store, size: int, wait_s: float, ready: Callable[[], None]) -> dict[str, Any]:
    end = time.monotonic() + wait_s
    missing = []
    for rank in range(size):
        try:
            store.wait([f"here/{rank}"], timedelta(seconds=max(0.01, end - time.monotonic())))
        except RuntimeError:
            missing.append(rank)
    if missing:
        return {"missing": missing}
    try:
        ready()
    except ConfigError as error:
        return {"refused": str(error)}
    return {"missing": [], **arranged([json.loads(store.get(f"here/{rank}")) for rank in range(size)])}


def _heard(store: dist.Store, launch: Launch, missing: Sequence[int]) -> None:
    """Before rank 0 ends, and perhaps the store with it: let the others read why."""
    if launch.rank != 0:
        store.set(f"heard/{launch.rank}", "")
        return
    others = [f"heard/{rank}" for rank in range(1, launch.size) if rank not in missing]
    if others:
        with contextlib.suppress(RuntimeError):
            store.wait(others, timedelta(seconds=_GRACE_S))


def arranged(said: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """From what each rank says, in rank order: `this_host()` and an address."""
    keys = [tuple(each[:-1]) for each in said]
    hosts = list(dict.fromkeys(keys))
    first = [said[keys.index(host)] for host in hosts]
    called = [str(host[0]) for host in hosts]
    names = [
        name if called.count(name) == 1 else f"{name} ({each[-1] or number})"
        for number, (name, each) in enumerate(zip(called, first, strict=True))
    ]
    names = [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names)]
    return {"names": names, "called": called, "host_of": [hosts.index(key) for key in keys]}


def gathered(store: dist.Store, launch: Launch, key: str, value: Any, limit_s: float) -> list[Any] | None:
    """Every rank's JSON value, on rank 0 alone; through the store, for want of anything better."""
    store.set(f"{key}/{launch.rank}", json.dumps(value))
    if launch.rank != 0:
        return None
    keys = [f"{key}/{rank}" for rank in range(launch.size)]
    store.wait(keys, timedelta(seconds=limit_s))
    return [json.loads(store.get(each)) for each in keys]


def described(layout: Layout) -> str:
    """`4 ranks on 2 hosts`."""
    return f"{plural(len(layout.host_of), 'rank')} on {plural(len(layout.names), 'host')}"
