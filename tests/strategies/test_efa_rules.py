"""The table of what each version needs for EFA, cell by cell, on machines made of stand-ins."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from strategies.ec2 import Machine, look
from strategies.efa_rules import KEEP, TABLE, VERSIONS, Action, Rule, fits, judge, read
from strategies.errors import ConfigError
from tests.strategies.efa_standins import StandIn

NEW = Machine(kernel="6.8.0-1050-aws", libfabric="2.6.0amzn1.0", plugin="1.21.1", nccl="2.29.7", instance="p5.48xlarge")
ROWS = list(enumerate(read()))


def row_of(entry: tuple[int, Rule]) -> str:
    number, rule = entry
    return f"{number + 2}-{rule.variable}-{rule.action.value}"


# The table itself.


def test_table_gives_a_reason_and_a_source_for_each_row() -> None:
    assert len(ROWS) > 20
    for _, rule in ROWS:
        assert len(rule.why) > 15, rule
        assert re.search(r"[\w-]+\.\w+", rule.source), rule
        assert "," not in rule.why, "a log line is read by people; the table by spreadsheets"


def test_table_has_known_columns_and_whole_rows() -> None:
    with TABLE.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["variable", "action", "value", *VERSIONS, "instance", "why", "source"]
        for row in reader:
            assert None not in row, row
            assert None not in row.values(), row


@pytest.mark.parametrize("entry", ROWS, ids=row_of)
def test_row_has_the_values_that_its_action_needs(entry: tuple[int, Rule]) -> None:
    _, rule = entry
    if rule.action in (Action.force, Action.only, Action.set):
        assert rule.values
        assert "*" not in rule.variable
    if rule.action is Action.set:
        assert len(rule.values) == 1
    assert rule.action is not Action.keep or not rule.values


# Each condition on a version, on both sides of it.


def thresholds() -> list[tuple[int, str, str, str]]:
    found = []
    for number, rule in ROWS:
        for column in VERSIONS:
            for part in rule.when.get(column, "").split():
                match = re.fullmatch(r"(>=|<)(.+)", part)
                assert match is not None, f"row {number + 2}: {part!r}: write >= or <"
                found.append((number, column, match[1], match[2]))
    return found


def below(version: str) -> str:
    """The release before it, as far as anybody can tell: 1.19.0amzn4.0 -> 1.19.0amzn3.0, 1.6.0 -> 1.5.99."""
    head, amzn, tail = version.partition("amzn")
    if amzn:
        return f"{head}amzn{int(tail.split('.')[0]) - 1}.0"
    numbers = [int(part) for part in head.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return ".".join(map(str, [*numbers[:-1], numbers[-1] - 1, 99]))


def fitting(rule: Rule) -> dict[str, str | None]:
    """A machine on which all of the row's conditions hold."""
    found: dict[str, str | None] = {
        "instance": rule.when.get("instance", "p4*").split("|")[0].replace("*", "d.24xlarge")
    }
    for column, new in (("libfabric", "2.6.0amzn1.0"), ("plugin", "1.21.1"), ("nccl", "2.29.7"), ("kernel", "6.8.0")):
        condition = rule.when.get(column, "")
        found[column] = condition[2:] if condition.startswith(">=") else below(condition[1:]) if condition else new
    return found


def standin(found: dict[str, str | None]) -> StandIn:
    nccl = found["nccl"]
    assert nccl is not None
    return StandIn(
        libfabric=found["libfabric"],
        plugin=found["plugin"],
        nccl=tuple(map(int, nccl.split("."))),
        kernel=f"{found['kernel']}-1044-aws",
        instance=str(found["instance"]),
    )


@pytest.mark.parametrize(("number", "column", "sign", "version"), thresholds())
def test_row_begins_and_ends_where_its_condition_says(
    number: int, column: str, sign: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ROWS[number][1]
    for folder, found, expected in (
        ("at", version, sign == ">="),
        ("before", below(version), sign == "<"),
    ):
        variables = standin({**fitting(rule), column: found}).install(tmp_path / folder, monkeypatch)
        machine = look(variables)
        assert getattr(machine, column).startswith(found)
        assert rule.applies(machine) is expected, f"{column} {found}"


@pytest.mark.parametrize("entry", [entry for entry in ROWS if "instance" in entry[1].when], ids=row_of)
def test_row_is_for_its_instance_types(entry: tuple[int, Rule]) -> None:
    for kind, expected in (("p4d.24xlarge", True), ("p5.48xlarge", True), ("g5.48xlarge", False), (None, False)):
        assert entry[1].applies(Machine(**{**fitting(entry[1]), "instance": kind})) is expected


@pytest.mark.parametrize("entry", [entry for entry in ROWS if set(VERSIONS) & set(entry[1].when)], ids=row_of)
def test_row_with_an_unknown_version_doesnt_apply(entry: tuple[int, Rule]) -> None:
    column = next(column for column in VERSIONS if column in entry[1].when)
    assert not entry[1].applies(Machine(**{**fitting(entry[1]), column: None}))


# What comes out for machines that there are, written down from AWS's own presets, not from the table.

AS_EVER = {"NCCL_NET": "AWS Libfabric", "FI_EFA_USE_HUGE_PAGE": "0"}
OLDEST = {**AS_EVER, "FI_PROVIDER": "efa", "NCCL_PROTO": "simple"}
RDMA = {"FI_EFA_USE_DEVICE_RDMA": "1"}
SYNC = {"FI_EFA_SET_CUDA_SYNC_MEMOPS": "0"}

MACHINES = {
    "installer 1.50 on p5": (StandIn(), AS_EVER),
    "installer 1.50 on p4d": (StandIn(instance="p4d.24xlarge"), AS_EVER),
    "installer 1.50 on g5": (StandIn(instance="g5.48xlarge"), AS_EVER),
    "a kernel of Amazon Linux 2": (StandIn(kernel="5.10.226-214.879.amzn2.x86_64"), AS_EVER),
    "libfabric 1.18, plugin 1.7, NCCL 2.18": (StandIn(libfabric="1.18.1", plugin="1.7.2", nccl=(2, 18, 5)), AS_EVER),
    "plugin 1.6 on p4d": (
        StandIn(libfabric="1.17.1", plugin="1.6.0", nccl=(2, 17, 1), instance="p4d.24xlarge"), AS_EVER | RDMA),
    "plugin 1.6 on p3dn": (
        StandIn(libfabric="1.17.1", plugin="1.6.0", nccl=(2, 17, 1), instance="p3dn.24xlarge"), AS_EVER),
    "plugin 1.5 on p4d": (
        StandIn(libfabric="1.16.1", plugin="1.5.0", nccl=(2, 16, 2), instance="p4d.24xlarge"), OLDEST | RDMA),
    "plugin 1.5 on p3dn": (
        StandIn(libfabric="1.16.1", plugin="1.5.0", nccl=(2, 16, 2), instance="p3dn.24xlarge"), OLDEST),
    "plugin 1.1.4, kernel 5.10": (
        StandIn(libfabric="1.13.2", plugin="1.1.4", nccl=(2, 11, 4), kernel="5.10.1", instance="p4d.24xlarge"),
        OLDEST | RDMA | {"FI_EFA_FORK_SAFE": "1"}),
    "installer 1.29.0 with NCCL 2.19": (StandIn(libfabric="1.19.0amzn3.0", plugin="1.7.4", nccl=(2, 19, 3)),
                                       AS_EVER | SYNC),
    "installer 1.29.0 with NCCL 2.18": (StandIn(libfabric="1.19.0amzn3.0", plugin="1.7.4", nccl=(2, 18, 5)), AS_EVER),
    "installer 1.29.1 with NCCL 2.19": (StandIn(libfabric="1.19.0amzn4.0", plugin="1.7.4", nccl=(2, 19, 3)), AS_EVER),
    "upstream 1.19.0 with NCCL 2.19": (StandIn(libfabric="1.19.0", plugin="1.7.4", nccl=(2, 19, 3)), AS_EVER | SYNC),
    "upstream 1.19.1 with NCCL 2.19": (StandIn(libfabric="1.19.1", plugin="1.7.4", nccl=(2, 19, 3)), AS_EVER),
    "a plugin that hides its version": (StandIn(plugin="GitHub-dev"), AS_EVER),
    "torch without NCCL": (StandIn(nccl=None), AS_EVER),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "expected"), MACHINES.values(), ids=MACHINES)
def test_judge_sets_what_the_versions_need_and_nothing_else(
    machine: StandIn, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = judge(look(machine.install(tmp_path, monkeypatch)), {}, {})
    assert verdict.changes == expected
    assert len(verdict.said) == len(expected)


# What was there before.

OLD = Machine(kernel="5.10.1", libfabric="1.16.1", plugin="1.5.0", nccl="2.16.2", instance="p4d.24xlarge")
SAGEMAKERS = {"NCCL_PROTO": "simple", "RDMAV_FORK_SAFE": "1", "FI_EFA_USE_DEVICE_RDMA": "1", "NCCL_MIN_NRINGS": "4"}


def test_judge_takes_away_what_sagemakers_launchers_set() -> None:
    verdict = judge(NEW, {**SAGEMAKERS, "NCCL_IB_DISABLE": "1", "FI_PROVIDER": "efa", "NCCL_DEBUG": "WARN"}, {})
    assert verdict.changes == {**AS_EVER, **dict.fromkeys(SAGEMAKERS)}
    assert any(line.startswith("RDMAV_FORK_SAFE=1 is taken away: variables of rdma-core") for line in verdict.said)
    assert any(line.endswith("(backend.env.NCCL_PROTO=simple keeps it)") for line in verdict.said)


def test_judge_on_old_versions_leaves_what_they_need() -> None:
    given = {"NCCL_PROTO": "simple", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_PROVIDER": "efa"}
    assert judge(OLD, given, {}).changes == AS_EVER


@pytest.mark.parametrize("name", ["RDMAV_HUGEPAGES_SAFE", "IBV_FORK_SAFE", "FI_EFA_MTU_SIZE", "FI_EFA_TX_IOV_LIMIT"])
def test_judge_takes_away_what_must_never_be_set(name: str) -> None:
    assert judge(NEW, {name: "8"}, {}).changes == {**AS_EVER, name: None}
    with pytest.raises(ConfigError, match=rf"{name} must not be set with EFA: .* \(backend.env.{name}\)\.$"):
        judge(NEW, {}, {name: "8"})


def test_judge_leaves_everything_that_it_is_asked_to() -> None:
    verdict = judge(NEW, {**SAGEMAKERS, KEEP: "1"}, {})
    assert verdict.changes == AS_EVER
    assert sum("stays because it was asked for" in line for line in verdict.said) == len(SAGEMAKERS)


def test_judge_leaves_other_values_and_says_so() -> None:
    verdict = judge(NEW, {"FI_EFA_USE_HUGE_PAGE": "1", "NCCL_PROTO": "LL128", "NCCL_MIN_NRINGS": "8"}, {})
    assert verdict.changes == {"NCCL_NET": "AWS Libfabric"}
    (line,) = [line for line in verdict.said if "stays" in line]
    assert line.startswith(
        "FI_EFA_USE_HUGE_PAGE=1 stays as the environment has it, where 0 would be set: with huge pages"
    )


def test_judge_sets_what_the_configuration_says_whatever_the_table_says() -> None:
    own = {"NCCL_PROTO": "simple", "FI_EFA_USE_HUGE_PAGE": "1", "NCCL_DEBUG": "INFO"}
    verdict = judge(NEW, {"NCCL_DEBUG": "WARN", "NCCL_PROTO": "simple"}, own)
    assert verdict.changes == {**own, "NCCL_NET": "AWS Libfabric"}
    assert "NCCL_DEBUG of the environment gives way to backend.env.NCCL_DEBUG" in verdict.said


@pytest.mark.parametrize("name", ["AWS Libfabric", "aws libfabric", "Libfabric", "OFI"])
def test_judge_takes_every_name_of_the_plugin(name: str) -> None:
    assert "NCCL_NET" not in judge(NEW, {"NCCL_NET": name}, {}).changes
    if "aws" not in name.lower():
        with pytest.raises(ConfigError, match="NCCL_NET="):
            judge(OLD, {"NCCL_NET": name}, {})


@pytest.mark.parametrize(
    ("machine", "given", "own"),
    [
        (NEW, {"NCCL_NET": "Socket"}, {}),
        (NEW, {}, {"NCCL_NET": "IB"}),
        (NEW, {"FI_PROVIDER": "tcp"}, {}),
        (OLD, {"FI_PROVIDER": "sockets"}, {}),
    ],
)
def test_judge_refuses_what_would_go_over_tcp_unless_allowed(
    machine: Machine, given: dict[str, str], own: dict[str, str]
) -> None:
    ((name, value),) = {**given, **own}.items()
    with pytest.raises(ConfigError, match=rf"^EFABackend: {name}={value} in .*\(backend.allow_tcp=true\)\.$"):
        judge(machine, given, own)
    verdict = judge(machine, given, own, allow_tcp=True)
    assert verdict.changes.get(name, value) == value
    assert verdict.changes.get("NCCL_NET") in (None, value)


@pytest.mark.parametrize(
    ("version", "condition", "expected"),
    [
        ("1.18", ">=1.18.0", True),
        ("1.18.0", "<1.18", False),
        ("1.9.1", "<1.18.0", True),
        ("1.19.0amzn4.0", ">=1.19.0", True),
        ("1.19.0", "<1.19.0amzn4.0", True),
        ("1.19.0amzn10.0", "<1.19.0amzn4.0", False),
        ("1.20.0", "<1.19.0amzn4.0", False),
        ("1.11.0-aws", "<1.12.0 >=1.11.0", True),
        ("5.15.0-1044-aws", "<5.15", False),
        ("5.10.226-214.879.amzn2.x86_64", "<5.15", True),
        ("2.29.7", "==2.29.7", True),
        ("unknown", ">=0", False),
        ("0", "<=0", True),
    ],
)
def test_fits_compares_by_number(version: str, condition: str, expected: bool) -> None:
    assert fits(version, condition) is expected


def test_fits_refuses_what_is_no_condition() -> None:
    with pytest.raises(ValueError, match="no condition"):
        fits("1", "1.2")
