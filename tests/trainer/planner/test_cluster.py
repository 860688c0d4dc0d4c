"""The machines that a plan is for: from the tables, from numbers of one's own, and measured."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.complaints import CONF, options
from trainer.config import compose, made
from trainer.instances import instances
from trainer.metrics.throughput import peak_flops_of
from trainer.planner import this
from trainer.planner.cluster import Cluster, Machines
from trainer.planner.devices import device_called, devices

CHOICES = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))
NAMED = [name for name in CHOICES if name not in ("custom", "this")]
OWN: dict[str, Any] = {"devices": 4, "memory_gib": 24, "peak_tflops": 80}
GIB = 2**30


def numbers_of(name: str) -> Numbers:
    """What its devices train in fastest."""
    return Numbers.bf16 if peak_flops_of(name, Numbers.bf16) else Numbers.fp16


@functools.cache
def chosen(choice: str) -> Cluster:
    """What `cluster=choice` makes, of four nodes."""
    cluster = made(compose([f"cluster={choice}", "cluster.nodes=4"]).cluster)
    assert isinstance(cluster, Cluster)
    return cluster


# The tables.


@pytest.mark.parametrize("row", instances().values(), ids=lambda row: row.type)
def test_instance_type_has_facts_with_sources(row: Any) -> None:
    assert row.gpu in row.device
    assert row.gpus in (0, row.devices)
    assert (row.price_per_h is None) == (row.price_date == "")
    assert row.price_per_h is None or re.search(r"price: @\w{8}$", row.source)
    assert row.price_date in ("", "2026-02-09", "2026-07-20")
    found = Cluster(instance=row.type).facts(numbers_of(row.device))
    assert found.device == row.device
    assert device_called(row.device) is not None
    assert 0.95 * row.gpu_memory_mib * 2**20 < found.memory_bytes <= row.gpu_memory_mib * 2**20
    assert found.memory_bytes_per_s
    assert (found.link_bytes_per_s is not None) == (row.devices > 1)
    for field in dataclasses.fields(Machines):
        value = getattr(found, field.name)
        if isinstance(value, float) or field.name in ("memory_bytes", "disk_bytes"):
            assert value is None or found.sources[field.name], field.name


def test_device_rows_are_reached_and_say_where_they_come_from() -> None:
    for device in devices():
        assert device.source
        name = device.pattern.replace(r"\b", " ").strip()
        assert device_called(f"NVIDIA {name}") is device
    assert device_called("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert device_called("NVIDIA GeForce RTX 9999") is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("p4d", (8, 312e12, 1555e9, 300e9, 50e9, 21.96)),
        ("p4de", (8, 312e12, 2039e9, 300e9, 50e9, 27.45)),
        ("p5", (8, 989.5e12, 3350e9, 450e9, 400e9, 55.04)),
        ("p5e", (8, 989.5e12, 4800e9, 450e9, 400e9, None)),
        ("g6e", (8, 362e12, 864e9, 32e9, 50e9, 30.13)),
        ("trn1", (16, 190e12, 820e9, 206e9, 100e9, 21.5)),
    ],
)
def test_facts_of_a_named_cluster_are_in_bytes_and_seconds(choice: str, expected: tuple[float, ...]) -> None:
    found = chosen(choice).facts(Numbers.bf16)
    rates = (found.memory_bytes_per_s, found.link_bytes_per_s, found.network_bytes_per_s)
    assert (found.devices, found.peak_flops, *rates, found.price_per_h) == pytest.approx(expected)
    assert found.price_note == ("" if found.price_per_h is None else "EC2 on-demand us-east-1, 2026-07-20")


def test_memory_is_what_the_driver_leaves_where_that_is_known() -> None:
    h100, l4 = (Cluster(instance=name).facts(Numbers.bf16) for name in ("p5.48xlarge", "g6.48xlarge"))
    assert h100.memory_bytes == round(79.18 * GIB)
    assert l4.memory_bytes == 22888 * 2**20
    assert "nominal" in l4.sources["memory_bytes"]
    assert "nominal" not in h100.sources["memory_bytes"]


def test_without_nvlink_gpus_reach_each_other_as_they_reach_the_host() -> None:
    found = Cluster(instance="g5.48xlarge", host_link_gb_per_s=20).facts(Numbers.bf16)
    assert found.link_bytes_per_s == found.host_link_bytes_per_s == 20e9
    assert found.sources["link_bytes_per_s"].startswith("no NVLink")
    assert Cluster(device="A100-SXM4-80GB", devices=8).facts(Numbers.bf16).link_bytes_per_s is None


# The configuration.


def test_choices_are_those_of_the_group_and_none_is_needed() -> None:
    assert options("cluster") == CHOICES
    assert len(NAMED) == 12
    assert compose([]).cluster is None
    assert compose(["cluster=null"]).cluster is None


@pytest.mark.parametrize("choice", NAMED)
def test_named_cluster_composes(choice: str) -> None:
    cluster = chosen(choice)
    assert cluster.instance is not None
    found = cluster.facts(numbers_of(instances()[cluster.instance].device))
    assert found.nodes == 4
    assert found.size == 4 * found.devices
    assert found.sources


def test_own_numbers_count_instead_of_the_tables() -> None:
    cluster = made(compose(["cluster=p4d", "cluster.price=12.5", "cluster.memory_gib=38", "cluster.devices=4"]).cluster)
    found = cluster.facts(Numbers.bf16)
    assert (found.devices, found.memory_bytes, found.price_per_h, found.price_note) == (4, 38 * GIB, 12.5, "yours")
    assert found.sources["memory_bytes"] == "yours (cluster.memory_gib)"
    assert found.sources["peak_flops"].startswith("the maker's")


def test_custom_needs_no_more_than_devices_memory_and_peak() -> None:
    found = made(compose(["cluster=custom", *(f"cluster.{key}={value}" for key, value in OWN.items())]).cluster).facts(
        Numbers.fp32
    )
    assert (found.devices, found.memory_bytes, found.peak_flops) == (4, 24 * GIB, 80e12)
    unknown = (found.memory_bytes_per_s, found.link_bytes_per_s, found.network_bytes_per_s, found.host_memory_bytes)
    assert (*unknown, found.host_link_bytes_per_s, found.disk_bytes, found.price_per_h) == (None,) * 7
    assert found.price_note == ""
    assert not found.efa


def test_custom_of_a_known_device_takes_its_numbers() -> None:
    found = Cluster(device="NVIDIA A100-SXM4-80GB", devices=2).facts(Numbers.bf16)
    assert (found.memory_bytes, found.peak_flops, found.power_w) == (round(79.25 * GIB), 312e12, 400)


def test_sagemaker_type_has_no_price_until_one_is_given() -> None:
    found = Cluster(instance="ml.p4d.24xlarge").facts(Numbers.bf16)
    assert (found.name, found.price_per_h, found.price_note) == ("ml.p4d.24xlarge", None, "")
    assert Cluster(instance="ml.p4d.24xlarge", price=25.0).facts(Numbers.bf16).price_note == "yours"


def test_more_nodes_are_the_same_machines() -> None:
    one = Cluster(instance="p5.48xlarge").facts(Numbers.bf16)
    assert dataclasses.replace(one.on(16), nodes=1) == one
    assert one.on(16).size == 128
    with pytest.raises(ConfigError, match=r"nodes=0 is not above 0.*\(cluster\.nodes\)"):
        one.on(0)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"instance": "p5.49xlarge"}, r"'p5.49xlarge'\. Nearest: p5.*\(cluster\.instance\)"),
    ({"instance": "zzz"}, r"Choices: g4dn\.12xlarge, .*cluster=custom"),
    ({"instance": "m5.large"}, r"no instance type with accelerators is known as 'm5.large'"),
    ({"instance": ""}, r"known as ''"),
    ({"instance": "p4d.24xlarge", "nodes": 0}, r"nodes=0 is not above 0\. .*\(cluster\.nodes\)"),
    ({"instance": "p4d.24xlarge", "nodes": -3}, r"nodes=-3 is not above 0"),
    ({"instance": "p4d.24xlarge", "nodes": 10**9}, r"nodes=1000000000 is not a number up to 100,000"),
    ({"instance": "p4d.24xlarge", "devices": 9}, r"devices=9, and p4d.24xlarge has 8\. Take fewer"),
    ({"instance": "p4d.24xlarge", "device": "H100"}, r"device=H100, and p4d.24xlarge has A100-SXM4-40GB\."),
    ({"instance": "p3.16xlarge", "efa": True}, r"p3.16xlarge has no EFA\. .*\(cluster\.efa\)"),
    ({"instance": "p4d.24xlarge", "measure": True}, r"\(cluster\.measure, cluster\.instance\)"),
    ({"measure": True, "device": "H100"}, r"\(cluster\.measure, cluster\.device\)"),
    ({**OWN, "memory_gib": 10_001}, r"memory_gib=10001 is not a number up to 10,000"),
    ({**OWN, "memory_gib": math.nan}, r"memory_gib=nan is not a number"),
    ({**OWN, "peak_tflops": math.inf}, r"peak_tflops=inf is not a number"),
    ({**OWN, "price": -1.0}, r"price=-1.0 is not above 0"),
    ({**OWN, "network_gbps": 0.0}, r"network_gbps=0.0 is not above 0"),
    ({**OWN, "device": " "}, r"device=' ' is no name\."),
    ({**OWN, "device": "H100\n"}, r"device='H100\\n' is no name\."),
]


@pytest.mark.parametrize(("settings", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_cluster_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Cluster(**settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("Cluster: ")
    assert "(cluster." in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "numbers", "said"),
    [
        ({}, Numbers.bf16, r"how many devices a node has.*\(cluster\.devices, cluster\.instance\)"),
        ({"devices": 8, "peak_tflops": 100}, Numbers.bf16, r"how much memory.*\(cluster\.memory_gib\)"),
        ({"devices": 8, "memory_gib": 80}, Numbers.bf16, r"no peak in bf16 is known of unknown.*Give its dense"),
        ({"instance": "p3dn.24xlarge"}, Numbers.bf16, r"precision=fp32 or fp16 or fp64, or.*\(cluster\.peak_tflops, "),
        (
            {"device": "A100", "devices": 8},
            Numbers.bf16,
            r"a device of custom has isn't known \(A100\)",
        ),
    ],
)
def test_facts_that_a_prediction_needs_are_asked_for(settings: dict[str, Any], numbers: Numbers, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Cluster(**settings).facts(numbers)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=p7"], r"cluster=p7 is not a choice\. Choices: custom, g5, "),
        (["cluster=p4d", "cluster.node=2"], r"no key 'cluster\.node'\. Nearest: nodes"),
        (["cluster=p4d", "cluster.nodes=two"], r"cluster\.nodes"),
        (["cluster.nodes=2"], r"nothing is chosen for cluster\. Choose one: cluster=\.\.\. of custom, g5"),
    ],
)
def test_wrong_choice_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(words)


# The machine at hand.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this, "_EACH_S", 0.02)
    monkeypatch.setattr(this, "_COPIED", {"cpu": 1 << 22})
    monkeypatch.setattr(this, "_WIDTH", {"cpu": 64})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    this.measured.cache_clear()


@pytest.mark.usefixtures("quick")
def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = made(compose(["cluster=this", "cluster.price=3"]).cluster).facts(Numbers.fp32)
    free = psutil.virtual_memory().available
    assert (found.name, found.device, found.devices, found.nodes) == ("this machine", "cpu", 1, 1)
    assert found.memory_bytes == pytest.approx(free, rel=0.2)
    assert 1e6 < found.peak_flops < 1e15
    assert found.memory_bytes_per_s is not None
    assert 1e6 < found.memory_bytes_per_s < 1e13
    assert found.disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert found.link_bytes_per_s is None
    assert found.price_per_h == 3
    assert re.fullmatch(
        r"measured here: 1 rank of \d+ threads?, each .* TFLOP/s in fp32, .* of disk are free", found.note
    )


@pytest.mark.usefixtures("quick")
def test_this_machine_of_two_ranks_shares_memory_and_measures_their_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this, "_gloo_rate", lambda: 2e9)
    one, two = (Cluster(measure=True, devices=ranks).facts(Numbers.fp32) for ranks in (1, 2))
    assert two.link_bytes_per_s == 2e9
    assert two.memory_bytes == pytest.approx(one.memory_bytes / 2, rel=0.2)
    assert "all-reduce 2.00 GB/s" in two.note


@pytest.mark.usefixtures("quick")
def test_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Cluster(measure=True).facts(Numbers.fp32)
    monkeypatch.setattr(this, "_processors", None)
    assert Cluster(measure=True).facts(Numbers.fp32) == first


@pytest.mark.usefixtures("quick")
def test_this_machine_that_cannot_compute_so_is_refused() -> None:
    with pytest.raises(ConfigError, match="tf32 needs a CUDA device"):
        Cluster(measure=True).facts(Numbers.tf32)


def test_two_processes_measure_an_all_reduce() -> None:
    assert 1e6 < this._gloo_rate() < 1e12


def test_two_processes_that_fail_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"two processes can't be measured.*\(cluster\.link_gb_per_s\)"):
        this._gloo_rate()


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("CPU", True), ("AMD Instinct MI300X", False)])
def test_machines_say_whether_ranks_compute_on_processors(device: str, expected: bool) -> None:
    assert Cluster(device=device, **OWN).facts(Numbers.bf16).on_processors is expected
