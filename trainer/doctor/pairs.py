"""Every two hosts, and every two ranks of a host, alone with each other: how fast each sends to the other.

A round holds pairs that share nobody, so that all of its links are measured at once and none disturbs another; n hosts
take n - 1 rounds. Each way is measured apart: only so can a slow sender be told from a slow receiver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from strategies.world import World
from trainer.doctor.collectives import finish
from trainer.doctor.hosts import Layout
from trainer.doctor.verdicts import suspects

Round = dict[int, int]
"""Each rank's partner, both ways."""

_FIRST = {"cuda": 2**20, "cpu": 2**16}
_CHUNK = {"cuda": 2**26, "cpu": 2**22}
"""Bytes of one message."""
_MOST_CHUNKS = 64
_PINGS = 16
_SUSPECTS = 8
_AGAIN = 2


@dataclass(kw_only=True)
class Links:
    """What was measured; pairs are (sender, receiver)."""

    gb_per_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """Between ranks, while the other ranks of their hosts sent as well."""
    us: dict[tuple[int, int], float] = field(default_factory=dict)
    """Half of the quickest round trip that the first began."""
    hosts_gb_per_s: dict[tuple[int, int], float] = field(default_factory=dict)
    """Between hosts, all ranks side by side until the last of them was done."""
    left_out: int = 0
    """Rounds for which there was no time."""

    def hosts_us(self, layout: Layout) -> dict[tuple[int, int], float]:
        """The quickest round trip between any two ranks of two hosts, halved."""
        found: dict[tuple[int, int], float] = {}
        for (source, to), us in self.us.items():
            pair = layout.host_of[source], layout.host_of[to]
            if pair in self.hosts_gb_per_s:
                found[pair] = min(us, found.get(pair, float("inf")))
        return found


def rounds(members: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every two of the members once, in as few rounds of disjoint pairs as there can be (the circle method)."""
    if len(members) < 2:
        return []
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def between_hosts(layout: Layout) -> list[Round]:
    """The ranks of two hosts side by side, the first with the first: so all network cards take part."""
    return [_partners(layout, pairs) for pairs in rounds(range(len(layout.names)))]


def inside_hosts(layout: Layout) -> list[Round]:
    """Every two ranks of each host, on all hosts at once."""
    each = [rounds(layout.ranks_on(host)) for host in range(len(layout.names))]
    return [
        _both_ways([pair for its in each if number < len(its) for pair in its[number]])
        for number in range(max(map(len, each)))
    ]


def _partners(layout: Layout, hosts: Sequence[tuple[int, int]]) -> Round:
    return _both_ways([pair for a, b in hosts for pair in zip(layout.ranks_on(a), layout.ranks_on(b), strict=False)])


def _both_ways(pairs: Sequence[tuple[int, int]]) -> Round:
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


def measure_links(
    world: World,
    layout: Layout,
    plan: Sequence[Round],
    again: Callable[[Links], list[Round]],
    *,
    seconds: float,
    budget_s: float,
    say: Callable[[str], None],
) -> Links:
    """Measure round after round, and what looks slow again; equal on every rank.

    Args:
        world: the ranks.
        layout: where they are.
        plan: rounds, the same on every rank.
        again: rounds of what looks slow.
        seconds: for each way of a pair.
        budget_s: for all rounds of the plan; the last ones are left out where it doesn't suffice.
        say: what is being done.
    """
    found = Links()
    begun = time.monotonic()
    for number, partners in enumerate(plan):
        if world.reduce([time.monotonic() - begun], "max")[0] > budget_s and number:
            found.left_out = len(plan) - number
            break
        say(f"round {number + 1} of {len(plan)}")
        _measure(world, layout, partners, seconds, found)
    for _ in range(_AGAIN):
        repeated = again(found)
        for partners in repeated:
            say("what looks slow, once more")
            _measure(world, layout, partners, seconds, found)
        if not repeated:
            break
    return found


def slow_hosts_again(layout: Layout) -> Callable[[Links], list[Round]]:
    """Pairs of hosts that look slow."""
    return lambda links: [_partners(layout, pairs) for pairs in _disjoint(suspects(links.hosts_gb_per_s, _SUSPECTS))]


def slow_ranks_again(links: Links) -> list[Round]:
    """Pairs of ranks that look slow."""
    return [_both_ways(pairs) for pairs in _disjoint(suspects(links.gb_per_s, _SUSPECTS))]


def _disjoint(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = []
    for pair in pairs:
        free = next((each for each in found if not {*pair} & {member for other in each for member in other}), None)
        if free is None:
            found.append([pair])
        else:
            free.append(pair)
    return found


def _measure(world: World, layout: Layout, partners: Round, seconds: float, into: Links) -> None:
    """One round; the better one counts of what was measured before."""
    order = {rank: (host, rank) for rank, host in enumerate(layout.host_of)}
    ahead = {rank: partner for rank, partner in partners.items() if order[rank] < order[partner]}
    for senders in (ahead, {partner: rank for rank, partner in ahead.items()}):
        _one_way(world, layout, senders, seconds, into)
        late = None
        if world.rank in senders:
            late = _ping(world, senders[world.rank], begins=True)
        elif world.rank in partners:
            _ping(world, partners[world.rank], begins=False)
        for rank, us in enumerate(world.gather(late)):
            if us is not None:
                pair = rank, senders[rank]
                into.us[pair] = min(us, into.us.get(pair, float("inf")))


def _one_way(world: World, layout: Layout, senders: Mapping[int, int], seconds: float, into: Links) -> None:
    """All senders at once, more and more, until it takes long enough to be believed.

    Limits on a link let a little through at once, so the first sizes say little. The ranks of a host may share its
    network: they begin together, and the host's rate is what all of them have sent until the last one was done.
    """
    chunk = torch.zeros(_CHUNK[world.device.type], device=world.device, dtype=torch.uint8)
    size, most = _FIRST[world.device.type], _MOST_CHUNKS * chunk.numel()
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, partner in senders.items():
        hosts = layout.host_of[rank], layout.host_of[partner]
        groups.setdefault(hosts if hosts[0] != hosts[1] else (rank, partner), []).append(rank)
    running = {rank: ranks for ranks in groups.values() for rank in ranks}
    from_whom = {partner: rank for rank, partner in senders.items()}
    while running:
        took = None
        if world.rank in running:
            took = _sent(world, senders[world.rank], chunk, size)
        elif from_whom.get(world.rank) in running:
            _receive(world, from_whom[world.rank], chunk, size)
        answers = world.gather(took)  # and nobody begins before all are done
        for rank, ranks in list(running.items()):
            last = max(answers[each] for each in ranks)
            if last < seconds / 4 and size < most:
                continue
            pair, hosts = (rank, senders[rank]), (layout.host_of[rank], layout.host_of[senders[rank]])
            into.gb_per_s[pair] = max(size / answers[rank] / 1e9, into.gb_per_s.get(pair, 0.0))
            if hosts[0] != hosts[1]:
                together = len(ranks) * size / last / 1e9
                into.hosts_gb_per_s[hosts] = max(together, into.hosts_gb_per_s.get(hosts, 0.0))
            del running[rank]
        size = min(most, 8 * size)


def _sent(world: World, partner: int, chunk: torch.Tensor, size: int) -> float:
    """Seconds until the partner says, over the control group, that it has all."""
    heard = torch.zeros(1, dtype=torch.int64)
    begun = time.perf_counter()
    _post(dist.isend, chunk, partner, size)
    dist.recv(heard, partner, group=world.control)
    return time.perf_counter() - begun


def _receive(world: World, partner: int, chunk: torch.Tensor, size: int) -> None:
    _post(dist.irecv, chunk, partner, size)
    finish(world)
    dist.send(torch.ones(1, dtype=torch.int64), partner, group=world.control)


def _post(operation: Callable[..., object], chunk: torch.Tensor, partner: int, size: int) -> None:
    # All at once: were each to wait for the one before, a round trip would lie between any two.
    whole, rest = divmod(size, chunk.numel())
    parts = [chunk] * whole + ([chunk[:rest]] if rest else [])
    for work in dist.batch_isend_irecv([dist.P2POp(operation, part, partner) for part in parts]):
        work.wait()


def _ping(world: World, partner: int, *, begins: bool) -> float:
    word = torch.zeros(8, device=world.device, dtype=torch.uint8)
    took = []
    for _ in range(_PINGS):
        begun = time.perf_counter()
        for operation in (dist.isend, dist.irecv) if begins else (dist.irecv, dist.isend):
            _post(operation, word, partner, word.numel())
        finish(world)
        took.append(time.perf_counter() - begun)
    return 1e6 * min(took) / 2  # other work on a host makes it longer, and nothing makes it shorter
