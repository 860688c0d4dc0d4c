"""Findings over hosts, and hosts' names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.doctor.check import Asked, Check, differing, judge, look
from trainer.doctor.clocks import judge_clocks, offset
from trainer.doctor.collectives import _predicted_s, expected_gb_per_s, judge_collectives
from trainer.doctor.findings import Finding, Level, listed, together, worst
from trainer.doctor.hosts import Layout, arranged
from trainer.doctor.measure import Measured, judge_measured
from trainer.doctor.pairs import Links
from trainer.doctor.speed import judge_speed
from trainer.instances import instances

torch = pytest.importorskip("torch")
ASKED = Asked(host="a", hosts=("a", "b"))


def finding(what: str, level: Level = Level.ok, advice: str = "") -> Finding:
    return Finding(check="x", level=level, what=what, advice=advice)


def test_together_says_the_same_once_and_names_who_differs() -> None:
    [same] = together({"a": [finding("well")], "b": [finding("well")]})
    assert (same.what, same.where) == ("well", ())
    bad = finding("3 of 4", Level.failure, "look")
    ok, failed = together({"a": [finding("well")], "b": [bad], "c": [finding("well")]})
    assert (ok.where, failed.where, failed.what) == (("a", "c"), ("b",), "3 of 4")
    [numbers] = together({"a": [finding("1 MiB/s")], "b": [finding("2 MiB/s")]})
    assert numbers.what == "1 MiB/s (a; 1 more alike)"
    worse = {each: [finding(f"{each} left", Level.warning)] for each in "abcdef"}
    assert together(worse)[0].what == "a: a left, b: b left, c: c left, d: d left and 2 more"


def test_worst_and_listed() -> None:
    assert worst([]) is Level.ok
    assert worst([finding("", Level.warning), finding("", Level.failure), finding("")]) is Level.failure
    assert listed(range(6)) == "0, 1, 2, 3 and 2 more"


class Hanging(Check):
    name = "hanging"
    limit_s = 0.2

    def look(self, asked: Asked) -> Any:
        time.sleep(30)

    def judge(self, found: Any) -> list[Finding]:
        raise AssertionError


class Broken(Check):
    name = "broken"

    def look(self, asked: Asked) -> Any:
        raise PermissionError("not\nallowed")

    def judge(self, found: Any) -> list[Finding]:
        raise AssertionError


class Well(Check):
    name = "well"

    def look(self, asked: Asked) -> Any:
        return 3

    def judge(self, found: Any) -> list[Finding]:
        return [self.ok(f"{found}")]

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        text = differing(hosts)
        return [self.failure(text)] if text else []


def test_look_survives_checks_that_hang_or_break() -> None:
    checks = [Hanging(), Broken(), Well()]
    begun = time.monotonic()
    found = look(checks, ASKED)
    assert time.monotonic() - begun < 5
    hanging, broken, well = judge(checks, {"a": found})
    assert hanging.level is Level.failure
    assert "no answer within 0 s" in hanging.what
    assert (broken.level, broken.what) == (
        Level.warning,
        "could not be looked at: PermissionError: not allowed",
    )
    assert (well.level, well.what) == (Level.ok, "3")


def test_judge_compares_hosts() -> None:
    looks = {host: {"well": {"found": value}} for host, value in {"a": 3, "b": 3, "c": 4}.items()}
    assert judge([Well()], looks)[-1].what == "4 on c; 3 on a, b"


def test_arranged_gives_hosts_of_one_name_different_ones() -> None:
    said = [["n", "boot", "net1", "10.0.0.1"], ["n", "boot", "net2", "10.0.0.2"], ["n", "boot", "net1", "10.0.0.1"]]
    assert arranged(said) == {"names": ["n (10.0.0.1)", "n (10.0.0.2)"], "called": ["n", "n"], "host_of": [0, 1, 0]}
    alike = [["n", "1", "net", None], ["n", "2", "net", None], ["m", "3", "net", "x"]]
    assert arranged(alike)["names"] == ["n (0)", "n (1)", "m"]


def test_offset_takes_the_quickest_round_trip() -> None:
    asked = [(0.0, 2.0, 101.9), (10.0, 10.02, 110.01 + 0.004), (20.0, 21.0, 120.1)]
    ahead, unsure = offset(asked)
    assert ahead == pytest.approx(100.004)
    assert unsure == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        ([0, 0.01, -0.02], Level.ok, "within 30.0 ms"),
        ([0, 3.0, 0.0], Level.warning, "b is 3.0 s ahead"),
        ([-900.0, 0.0, 0.0], Level.failure, "a is 900.0 s behind"),
        ([0, 900, 900], Level.failure, "a is 900.0 s behind"),
    ],
)
def test_judge_clocks_names_who_is_off_from_most(ahead: list[float], level: Level, words: str) -> None:
    [found] = judge_clocks([[each, 0.001] for each in ahead], ["a", "b", "c"])
    assert found.level is level
    assert words in found.what


def test_judge_clocks_does_not_blame_what_the_round_trip_hides() -> None:
    [found] = judge_clocks([[0.0, 0.0], [0.7, 0.5]], ["a", "b"])
    assert found.level is Level.ok


LAYOUT = Layout(names=("a", "b"), called=("a", "b"), host_of=(0, 0, 1, 1))


def test_judge_speed_names_the_slow_rank() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert judge_speed([1e12, 0.7e12, 1e12, 1.1e12], LAYOUT, cpu)[0].level is Level.ok
    [found] = judge_speed([1e12, 1e12, 0.3e12, 1e12], LAYOUT, cpu)
    assert (found.level, found.where) == (Level.warning, ("rank 2",))
    assert "rank 2 (b) is slow: 30% of the usual 1.00 TFLOP/s" in found.what
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.doctor.speed.peak_flops", lambda device, numbers: 2e12)
        assert "50% of the device's peak" in judge_speed([1e12] * 4, LAYOUT, cuda)[0].what
        assert judge_speed([1e12, 1e12, 0.7e12, 1e12], LAYOUT, cuda)[0].level is Level.warning
        assert judge_speed([1e12, 1e12, 0.3e12, 1e12], LAYOUT, cuda)[0].level is Level.failure


def test_predicted_time_leaves_out_what_does_not_grow() -> None:
    rows = [{"bytes": 1000, "ms": 1.0}, {"bytes": 2000, "ms": 2.0}]
    assert _predicted_s(rows[:1], 10**9) == 0.0
    assert _predicted_s(rows, 4000) == pytest.approx(0.004)


def test_expected_rate_of_collectives_and_its_verdict() -> None:
    p4d = instances()["p4d.24xlarge"]
    assert expected_gb_per_s(p4d, 1) == 300
    assert expected_gb_per_s(p4d, 2) == 50
    assert expected_gb_per_s(instances()["g5.48xlarge"], 1) is None
    assert expected_gb_per_s(None, 2) is None
    for rate, level in ((40.0, Level.ok), (20.0, Level.warning), (3.0, Level.failure)):
        [found] = judge_collectives({"all_reduce": [{"bytes": 1, "bus_gb_per_s": rate}]}, 50.0, p4d)
        assert (found.check, found.level) == ("all-reduce", level)
    assert judge_collectives({"all_reduce": [{"bytes": 1, "bus_gb_per_s": 0.1}]}, None, None)[0].level is Level.ok


GPUS = Layout(names=("a", "b", "c"), called=("a", "b", "c"), host_of=(0, 0, 1, 1, 2, 2))


def between(slow: set[int]) -> Measured:
    """Three hosts of two GPUs; what these ranks send takes ten times as long."""
    pairs = [(a, b) for a in range(6) for b in range(6) if a // 2 != b // 2 and a % 2 == b % 2]
    rates = {pair: 2.5 if pair[0] in slow else 25.0 for pair in pairs}
    hosts = {
        (a // 2, b // 2): sum(rate for (c, d), rate in rates.items() if (a // 2, b // 2) == (c // 2, d // 2))
        for a, b in pairs
    }
    links = Links(gb_per_s=rates, us=dict.fromkeys(pairs, 20.0), hosts_gb_per_s=hosts)
    return Measured(flops=[1e12] * 6, between=links)


@pytest.mark.parametrize(
    ("slow", "where"),
    [(set(), {}), ({3}, {"ranks of two hosts": ("rank 3 (b)",)}), ({2, 3}, {"between hosts": ("b",)})],
)
def test_judge_measured_names_the_slow_card_or_the_slow_host(slow: set[int], where: dict[str, tuple[str, ...]]) -> None:
    world: Any = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.doctor.speed.peak_flops", lambda device, numbers: None)
        found = judge_measured(between(slow), GPUS, world, instances()["p4d.24xlarge"])
    assert {each.check: each.where for each in found if each.level is not Level.ok} == where
