"""Which host, rank or link is slow: each rate held against what the others reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.doctor.findings import Finding, Level, listed, plural

Rates = Mapping[tuple[int, int], float]
"""GB/s from one to another; pairs may be missing."""

SLOW = 0.5
"""Part of the usual rate below which a link is named."""
_GRAVE = 0.25
_MUCH_LATER = 3.0


@dataclass(frozen=True, kw_only=True)
class Slow:
    """What is slow, as far as the measured pairs can tell it apart."""

    usual: float
    """GB/s that most reach."""
    senders: dict[int, float]
    """Those that are slow to whomever they send, and the rate that most of theirs reach."""
    receivers: dict[int, float]
    links: dict[tuple[int, int], float]
    """Slow from the first to the second, and not because one of them is slow with everybody."""

    @property
    def any(self) -> bool:
        """Something is."""
        return bool(self.senders or self.receivers or self.links)


def upper_median(values: Sequence[float]) -> float:
    """The middle one; of an even number the larger: half of them may be slow, and it is still a good one."""
    return sorted(values)[len(values) // 2]


def usual_rate(rates: Rates) -> float:
    """What most reach on their best link. It holds as long as fewer than half are slow with everybody."""
    members = {member for pair in rates for member in pair}
    return upper_median([max(rate for pair, rate in rates.items() if member in pair) for member in members])


def find_slow(rates: Rates) -> Slow:
    """Tell slow senders and receivers from slow links.

    Two alone have one link: of it only the slower way is known, and its sender is named.
    """
    usual = usual_rate(rates)
    slow = {pair: rate for pair, rate in rates.items() if rate < SLOW * usual}
    members = sorted({member for pair in rates for member in pair})
    by_sender = {each: [rate for (source, _), rate in rates.items() if source == each] for each in members}
    by_receiver = {each: [rate for (_, to), rate in rates.items() if to == each] for each in members}

    def lame(sides: Mapping[int, list[float]]) -> dict[int, float]:
        # Of one rate alone nobody can say whose fault it is.
        most = {each: upper_median(its) for each, its in sides.items() if len(its) > 1}
        return {each: rate for each, rate in most.items() if rate < SLOW * usual}

    senders, receivers = lame(by_sender), lame(by_receiver)
    if len(members) == 2:
        return Slow(usual=usual, senders={source: rate for (source, _), rate in slow.items()}, receivers={}, links={})
    links = {pair: rate for pair, rate in slow.items() if pair[0] not in senders and pair[1] not in receivers}
    return Slow(usual=usual, senders=senders, receivers=receivers, links=links)


def suspects(rates: Rates, most: int) -> list[tuple[int, int]]:
    """Pairs to look at again before anybody is named; the slowest first, each once."""
    usual = usual_rate(rates) if rates else 0.0
    slow = sorted((rate, pair) for pair, rate in rates.items() if rate < SLOW * usual)
    return list(dict.fromkeys((min(pair), max(pair)) for _, pair in slow))[:most]


def judge_links(
    check: str,
    rates: Rates,
    latencies_us: Rates,
    names: Sequence[str],
    *,
    bits: bool,
    only_warn: bool,
) -> list[Finding]:
    """Name what is slow.

    Args:
        check: what was measured.
        rates: GB/s, each way.
        latencies_us: one way, half of the quickest round trip.
        names: of hosts or ranks.
        bits: say Gbit/s, as people do of networks.
        only_warn: other things than hardware may be the reason.
    """
    if not rates:
        return []
    found = find_slow(rates)
    findings = _late(check, latencies_us, names)
    if not found.any:
        low, high = min(rates.values()), max(rates.values())
        late = upper_median(list(latencies_us.values()))
        what = f"{plural(len(rates) // 2, 'pair')}, {_rate(low, bits)} to {_rate(high, bits)} each way, {late:,.0f} µs"
        return [*findings, Finding(check=check, level=Level.ok, what=what)]

    def say(rate: float, where: Sequence[int], what: str, advice: str) -> Finding:
        grave = rate < _GRAVE * found.usual and not only_warn
        return Finding(
            check=check,
            level=Level.failure if grave else Level.warning,
            what=f"{what} {_rate(rate, bits)}, {rate / found.usual:.0%} of the usual {_rate(found.usual, bits)}",
            where=tuple(names[each] for each in where),
            advice=advice,
        )

    alone = len({member for pair in rates for member in pair}) == 2
    for each, rate in found.senders.items():
        other = next(to for source, to in rates if source == each)
        advice = (
            "Look at its sending side: network card, cable, limits (tc qdisc show, the instance type's), other jobs"
        )
        if alone:
            advice += f"; the receiving side of {names[other]} can only be told apart by a third"
        findings.append(say(rate, [each], f"{names[each]} is slow at sending:", advice))
    for each, rate in found.receivers.items():
        advice = "Look at its receiving side: network card, cable, limits (tc filter, the instance type's), other jobs"
        findings.append(say(rate, [each], f"{names[each]} is slow at receiving:", advice))
    for (source, to), rate in found.links.items():
        what = f"the link from {names[source]} to {names[to]} is slow:"
        findings.append(say(rate, [source, to], what, "Look at what lies between them: switch, cable, placement group"))
    return findings


def _late(check: str, latencies_us: Rates, names: Sequence[str]) -> list[Finding]:
    """Links that take much longer than most, where there are enough to compare."""
    if len({(min(pair), max(pair)) for pair in latencies_us}) < 3:
        return []
    usual = upper_median(list(latencies_us.values()))
    late = {pair: us for pair, us in latencies_us.items() if us > _MUCH_LATER * usual + 50}
    if not late:
        return []
    return [
        Finding(
            check=check,
            level=Level.warning,
            what=listed([f"{names[a]} to {names[b]} takes {us:,.0f} µs" for (a, b), us in late.items()])
            + f", where {usual:,.0f} µs are usual",
            advice="Small messages wait for the slowest: use one placement group or rack",
        )
    ]


def _rate(gb_per_s: float, bits: bool) -> str:
    return f"{8 * gb_per_s:,.2f} Gbit/s" if bits else f"{gb_per_s:,.2f} GB/s"


def judge_expected(rates: Rates, names: Sequence[str], network_gbps: float | None, kind: str) -> list[Finding]:
    """What hosts send to each other against what their instance type's network can do.

    Args:
        rates: GB/s between hosts, all GPUs of a host together.
        names: of the hosts.
        network_gbps: of the type; None: not known.
        kind: the type.
    """
    if network_gbps is None or not rates:
        return []
    best = {host: max(rate for (source, _), rate in rates.items() if source == host) for host in {a for a, _ in rates}}
    part = {names[host]: 8 * rate / network_gbps for host, rate in best.items()}
    low = {name: each for name, each in part.items() if each < SLOW}
    what = f"hosts reach {min(part.values()):.0%} to {max(part.values()):.0%} of the {network_gbps:,g} Gbit/s of {kind}"
    if not low:
        return [Finding(check="network rate", level=Level.ok, what=what)]
    return [
        Finding(
            check="network rate",
            level=Level.failure if min(low.values()) < _GRAVE else Level.warning,
            what=what,
            where=tuple(low),
            advice="See the findings on EFA and on NCCL's network",
        )
    ]
