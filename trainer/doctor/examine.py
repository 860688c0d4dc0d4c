"""The whole examination: a roll call, a look at each host, then what lies between them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from strategies.backends import Backend, connect_ranks, disconnect_ranks
from strategies.errors import ConfigError, TrainingError
from strategies.world import Launch, World, open_store
from trainer.doctor import check
from trainer.doctor.check import Asked, Check
from trainer.doctor.disk import DiskCheck
from trainer.doctor.efa import EFACheck, devices
from trainer.doctor.findings import Finding, Level, together, worst
from trainer.doctor.gpus import GPUsCheck
from trainer.doctor.guard import Guard
from trainer.doctor.host import LimitsCheck, MemoryCheck, SharedMemoryCheck, VersionsCheck
from trainer.doctor.hosts import Layout, described, gathered, roll_call
from trainer.doctor.instances import detected
from trainer.doctor.measure import FULL, QUICK, Measured, judge_measured, measure
from trainer.doctor.nccl import Listening, judge_network
from trainer.doctor.network import InterfacesCheck, NamesCheck, route
from trainer.instances import instances
from trainer.liveness import is_broken_connection

CHECKS: tuple[Check, ...] = (
    VersionsCheck(),
    GPUsCheck(),
    EFACheck(),
    MemoryCheck(),
    SharedMemoryCheck(),
    LimitsCheck(),
    DiskCheck(),
    InterfacesCheck(),
    NamesCheck(),
)
_LOOK_S = 60.0
_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How to examine."""

    quick: bool = False
    folders: tuple[Path, ...] = ()
    """Where the job will write."""
    instance_type: str | None = None
    """null: as the hosts say."""
    wait_s: float = 60.0
    """For a rank that isn't there yet, and for one that doesn't answer."""


@dataclass(kw_only=True)
class Report:
    """What was found; whole on rank 0."""

    layout: Layout
    findings: list[Finding] = field(default_factory=list)
    looks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By host and check."""
    measured: Measured = field(default_factory=Measured)
    took_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Something is so wrong that a job will fail or crawl."""
        return worst(self.findings) is Level.failure

    @property
    def title(self) -> str:
        """For people."""
        return f"{described(self.layout)}, looked at in {self.took_s:.0f} s"

    def as_json(self) -> dict[str, Any]:
        """What `doctor.json` holds besides the environment."""
        return {
            "verdict": worst(self.findings).value,
            "took_s": round(self.took_s, 1),
            "findings": [finding.as_json() for finding in self.findings],
            "hosts": {
                name: {"ranks": self.layout.ranks_on(host), **self.looks.get(name, {})}
                for host, name in enumerate(self.layout.names)
            },
            **self.measured.as_json(self.layout),
        }


def examine(
    wanted: Wanted,
    backend: Backend,
    ready: Callable[[], None],
    finish: Callable[[Report], None],
    say: Callable[[str], None],
) -> bool:
    """Examine all hosts of this launch.

    Args:
        wanted: how.
        backend: with which the job will connect; here it waits no longer than `wanted.wait_s`.
        ready: called on rank 0 before anything is looked at; may refuse.
        finish: called on rank 0 with what was found.
        say: what is being done.

    Returns:
        Whether something failed; the same on every rank.

    Raises:
        ConfigError: the ranks' environment is wrong, or `ready` or `finish` raised it.
        TrainingError: a rank is missing, or was lost; on all that are left.
    """
    begun = time.monotonic()
    launch = Launch.from_env()
    with Guard(launch) as guard, _losses_named(guard):
        report, store = _met(launch, wanted, guard, say, ready)
        _look(report, store, launch, wanted, guard, say, backend.interface)
        listening = Listening()
        with listening.open():
            say("connecting the ranks")
            with guard.step("connecting the ranks", 2 * wanted.wait_s + 2 * _GRACE_S):
                patient = replace(backend, timeout_s=min(backend.timeout_s, wanted.wait_s))
                world = _connected(patient, report, store, guard)
            if world is not None:
                report.findings += [
                    Finding(check="backend", level=Level.ok, what=note.rstrip(".")) for note in world.notes
                ]
                _between(report, world, wanted, guard, say)
        with guard.step("writing the report", 2 * wanted.wait_s):
            if world is not None and world.device.type == "cuda":
                _hear(report, world, listening)
            report.took_s = time.monotonic() - begun
            failed = _finished(report, launch, world, store, finish)
        with guard.step("leaving", wanted.wait_s):
            disconnect_ranks()
    return failed


def _finished(
    report: Report, launch: Launch, world: World | None, store: dist.Store, finish: Callable[[Report], None]
) -> bool:
    if world is None:
        if launch.rank == 0:
            finish(report)
            store.set("reported", "")
        with contextlib.suppress(RuntimeError):  # whoever leaves first may be the end of all
            store.wait(["reported"], timedelta(seconds=_LOOK_S))
        return True
    with world.together():
        if world.rank == 0:
            finish(report)
    return world.broadcast(report.failed)


def examine_connected(world: World, wanted: Wanted, say: Callable[[str], None]) -> Report:
    """The same where the ranks are connected already; whole on rank 0.

    Raises:
        TrainingError: a rank was lost.
    """
    begun = time.monotonic()
    launch = Launch.from_env()
    with Guard(launch) as guard, _losses_named(guard):
        report, store = _met(launch, wanted, guard, say, lambda: None)
        _look(report, store, launch, wanted, guard, say, None)
        _between(report, world, wanted, guard, say)
    report.took_s = time.monotonic() - begun
    return report


def _met(
    launch: Launch, wanted: Wanted, guard: Guard, say: Callable[[str], None], ready: Callable[[], None]
) -> tuple[Report, dist.Store]:
    """All ranks are there."""
    say("waiting for all ranks")
    end = time.monotonic() + wanted.wait_s
    with guard.step("waiting for all ranks", wanted.wait_s + 2 * _GRACE_S):
        base = open_store(launch)
        number = base.add(f"doctor/{launch.rank}", 1)  # a script may examine more than once
        guard.attach(base, f"doctor/{number}")
        store = dist.PrefixStore(f"doctor/{number}", base)
        layout = roll_call(store, launch, max(1.0, end - time.monotonic()), _address(), ready)
    guard.learn(layout)
    return Report(layout=layout), store


def _look(
    report: Report,
    store: dist.Store,
    launch: Launch,
    wanted: Wanted,
    guard: Guard,
    say: Callable[[str], None],
    interface: str | None,
) -> None:
    """At each host, by its first rank."""
    say("looking at each host")
    layout = report.layout
    host = layout.host_of[launch.rank]
    with guard.step("looking at each host", _LOOK_S):
        mine = None
        if launch.rank in layout.leaders:
            asked = Asked(
                host=layout.called[host],
                hosts=layout.called,
                ranks_here=len(layout.ranks_on(host)),
                threads=torch.get_num_threads(),
                folders=wanted.folders,
                instance_type=wanted.instance_type or detected(),
                meeting=_meeting(launch),
                interface=interface,
                quick=wanted.quick,
            )
            mine = {**check.look(CHECKS, asked), "instance_type": asked.instance_type}
        looks = gathered(store, launch, "looks", mine, _LOOK_S)
    if looks is not None:
        report.looks = {layout.names[number]: looks[leader] for number, leader in enumerate(layout.leaders)}
        report.findings += check.judge(CHECKS, report.looks)


def _connected(backend: Backend, report: Report, store: dist.Store, guard: Guard) -> World | None:
    """None: they can't, which is a finding as well; what was found of the hosts mostly says why."""
    outcome: list[World | Exception] = []

    def connect() -> None:
        try:
            outcome.append(connect_ranks(backend))
        except Exception as error:
            outcome.append(error)

    # Gloo may wait much longer than it is told to, and then there is still something to report.
    thread = threading.Thread(target=connect, name="doctor-connect", daemon=True)
    thread.start()
    end = time.monotonic() + backend.timeout_s + _GRACE_S
    while thread.is_alive() and time.monotonic() < end and not store.check(["unconnected"]):
        thread.join(0.1)
    found = outcome[0] if outcome else None
    if isinstance(found, World):
        if found.device.type == "cuda":
            torch.cuda.set_device(found.device)  # it counts for the thread that says so
        return found
    # A library that doesn't start is a TrainingError.
    if isinstance(found, ConfigError) or not (found is None or _is_lost(found) or isinstance(found, TrainingError)):
        raise found
    why = "no answer" if found is None else _first_line(found)
    why = store.compare_set("unconnected", "", why).decode()  # the first one knows best
    report.findings.append(
        Finding(
            check="connection",
            level=Level.failure,
            what=f"the ranks can't connect: {guard.lost() or why}",
            advice="Look at the interface and names above, and at firewalls and security groups between the hosts",
        )
    )
    return None


def _between(report: Report, world: World, wanted: Wanted, guard: Guard, say: Callable[[str], None]) -> None:
    report.measured = measure(world, report.layout, QUICK if wanted.quick else FULL, guard, say)
    if world.rank == 0:
        kinds = {looks["instance_type"] for looks in report.looks.values()}
        instance = instances().get(kinds.pop() or "") if len(kinds) == 1 else None
        report.findings += judge_measured(report.measured, report.layout, world, instance)


def _hear(report: Report, world: World, listening: Listening) -> None:
    """What NCCL has said on each host."""
    leads = world.rank in report.layout.leaders
    mine = {"text": listening.text, "why_not": listening.why_not, "efa": bool(devices())} if leads else None
    heard = world.collect(mine)
    if heard is not None:
        names = report.layout.names
        said = {
            names[host]: judge_network(heard[leader], efa=heard[leader]["efa"], hosts=len(names))
            for host, leader in enumerate(report.layout.leaders)
        }
        report.findings += together(said)


@contextlib.contextmanager
def _losses_named(guard: Guard) -> Iterator[None]:
    """What a rank hears when another one is gone becomes one line that says which.

    Raises:
        TrainingError: that was it.
    """
    try:
        yield
    except (ConfigError, TrainingError):
        raise
    except Exception as error:
        if not _is_lost(error):
            raise
        who = guard.lost() or _first_line(error)
        raise TrainingError(f"doctor: while {guard.at}: {who}.") from error


def _is_lost(error: Exception) -> bool:
    return is_broken_connection(error) or "timed out" in str(error).lower()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def _meeting(launch: Launch) -> tuple[str, int] | None:
    """Where the store is, as the environment says by now."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    return (address, int(port)) if launch.size > 1 and address and port.isdigit() else None


def _address() -> str | None:
    """From which this host talks to the ranks' store; hosts may have one name."""
    meeting = _meeting(Launch.from_env())
    return None if meeting is None else route(*meeting)
