from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from strategies.errors import ConfigError
from strategies.precision import Numbers
from trainer.planner.cluster import Cluster
from trainer.planner.efficiency import EVERY_DEVICE, EVERY_NUMBERS, Efficiency, Row, efficiency_of, rows
from trainer.planner.kernels import Call, Kind
from trainer.planner.speed import compute
from trainer.planner.stages import Stage, Trace

REFERENCES = Path(__file__).with_name("references")
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
DEVICES = {
    H100: "H100",
    A100: "A100",
    "NVIDIA GB300": "GB300",
    "NVIDIA B300": "B300",
    "NVIDIA GB200": "GB200",
    "NVIDIA B200": "B200",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H800": "H800",
    "NVIDIA A800-SXM4-80GB": "A800",
    "NVIDIA A40": "A40",
    "NVIDIA A30": "A30",
    "NVIDIA A10G": "A10G",
    "NVIDIA A10": "A10",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA L40S": "L40S",
    "NVIDIA L40": "L40",
    "NVIDIA L4": "L4",
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla T4": "T4",
    "Accelerator 9000": "",
}
"""Each one's name, and what the rows call it."""
REFERENCE_FILES = ("zero_table1.csv", "torchtitan.csv", "fsdp_paper.csv", "other_runs.csv", "collectives_p5.csv")

WORDS = {"model", "device", "strategy", "parallelism", "activation_checkpointing", "compile", "precision", "numbers"}
WORDS |= {"collective", "fits", "source", "note"}


def reference(name: str) -> list[dict[str, str]]:
    with (REFERENCES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def shown(row: Row) -> str:
    return f"{row.device}-{'_'.join(row.numbers)}-{row.factor}"


@pytest.mark.parametrize("row", rows(), ids=shown)
def test_row_of_the_table_is_sourced_and_within_its_range(row: Row) -> None:
    assert row.factor in (*Efficiency.factors(), "nominal_w")
    assert len(row.source) > 8
    assert row.numbers == (EVERY_NUMBERS,) or all(name in Numbers.__members__ for name in row.numbers)
    assert math.isfinite(row.value)
    assert row.value > 0
    assert (row.low or row.value) <= row.value <= (row.high or row.value)
    if row.factor in ("matmul", "attention_forward", "attention_backward", "memory", "fusion", "power"):
        assert (row.high or row.value) <= 1
    if row.factor == "overlap":
        assert row.value >= 1


def test_rows_of_one_factor_and_format_are_single() -> None:
    keys = [(row.device, row.factor, name) for row in rows() for name in row.numbers]
    assert len(keys) == len(set(keys))
    mixed = {(device, factor) for device, factor, name in keys if name == EVERY_NUMBERS}
    assert not [key for key in keys if key[:2] in mixed and key[2] != EVERY_NUMBERS]


@pytest.mark.parametrize("numbers", Numbers)
@pytest.mark.parametrize("device", DEVICES)
def test_efficiency_of_a_device_without_rows_says_where_each_factor_is_from(device: str, numbers: Numbers) -> None:
    found = efficiency_of(device, numbers)
    said = {factor for note in found.notes for factor in note.split(": ")[0].split(", ")}
    own = {
        row.factor
        for row in rows()
        if row.device in (EVERY_DEVICE, DEVICES[device])
        and (row.numbers == (EVERY_NUMBERS,) or numbers.name in row.numbers)
    }
    assert said == set(Efficiency.factors()) - own
    for factor in Efficiency.factors():
        assert getattr(found, factor) > 0
        assert found.sources[factor]
        low, high = found.ranges[factor]
        assert (low or 0) <= getattr(found, factor) <= (high or math.inf)


def test_efficiency_of_h100_in_bf16_is_all_its_own() -> None:
    found = efficiency_of(H100, Numbers.bf16)
    assert found.notes == ()
    assert found.nominal_w == 700
    assert found.matmul == 0.676


def test_efficiency_of_a100_in_bf16_takes_two_factors_from_h100() -> None:
    assert efficiency_of(A100, Numbers.bf16).notes == ("inter_step_s, power: not measured on A100, taken from H100",)


@pytest.mark.parametrize(
    ("device", "numbers", "factor", "like"),
    [
        ("NVIDIA H100 NVL", Numbers.bf16, "matmul", H100),
        ("NVIDIA GB200", Numbers.bf16, "matmul", "NVIDIA B200"),
        ("NVIDIA B200", Numbers.bf16, "memory", "NVIDIA H200"),
        ("NVIDIA L4", Numbers.bf16, "matmul", "NVIDIA RTX A6000"),
        ("NVIDIA L4", Numbers.bf16, "memory", A100),
        ("Accelerator 9000", Numbers.bf16, "matmul", A100),
    ],
)
def test_efficiency_of_a_device_without_a_factor_is_the_nearest_ones(
    device: str, numbers: Numbers, factor: str, like: str
) -> None:
    assert getattr(efficiency_of(device, numbers), factor) == getattr(efficiency_of(like, numbers), factor)


def test_efficiency_of_a_format_without_a_factor_is_the_nearest_format_on_the_same_device() -> None:
    found = efficiency_of("Tesla V100-SXM2-16GB", Numbers.bf16)
    assert found.matmul == efficiency_of("Tesla V100-SXM2-16GB", Numbers.fp16).matmul
    assert "matmul: not measured on V100 in bf16, taken from V100 in fp16" in found.notes


def test_at_power_below_nominal_slows_products_alone() -> None:
    full = efficiency_of(H100, Numbers.bf16)
    capped = full.at_power(500)
    # 596 TFLOP/s at 500 W (symm-mem-recipes), of a peak of 989.5: 0.603.
    assert capped.matmul == pytest.approx(0.603, rel=0.05)
    assert full.matmul > full.at_power(600).matmul > capped.matmul
    assert capped.attention_forward / full.attention_forward == pytest.approx(capped.matmul / full.matmul)
    assert (capped.memory, capped.intra_collective) == (full.memory, full.intra_collective)
    assert "500 W" in capped.notes[-1]
    assert capped.at_power(400).matmul == pytest.approx(full.at_power(400).matmul)


def test_at_power_above_nominal_changes_nothing_and_says_so() -> None:
    full = efficiency_of(H100, Numbers.bf16)
    raised = full.at_power(800)
    assert raised.matmul == full.matmul
    assert "800 W is no limit" in raised.notes[-1]


@pytest.mark.parametrize(("device", "watts"), [(H100, 0.0), (H100, math.nan), ("NVIDIA L4", 50.0)])
def test_at_power_without_meaning_is_refused(device: str, watts: float) -> None:
    with pytest.raises(ConfigError, match=r"power_limit_w"):
        efficiency_of(device, Numbers.bf16).at_power(watts)


def test_with_factors_takes_what_was_measured_and_says_so() -> None:
    found = efficiency_of(H100, Numbers.bf16).with_factors(matmul=0.66, launch_s=0)
    assert (found.matmul, found.launch_s) == (0.66, 0)
    assert found.memory == efficiency_of(H100, Numbers.bf16).memory
    assert found.notes == ("given: matmul=0.66, launch_s=0",)
    assert (found.sources["matmul"], found.ranges["matmul"]) == ("given", (None, None))


@pytest.mark.parametrize("values", [{"matmull": 0.5}, {"matmul": 0.0}, {"memory": -1.0}, {"power": math.inf}])
def test_with_factors_of_no_such_factor_or_value_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        efficiency_of(H100, Numbers.bf16).with_factors(**values)


@pytest.mark.parametrize("name", REFERENCE_FILES)
def test_reference_row_is_sourced_and_its_numbers_are_numbers(name: str) -> None:
    found = reference(name)
    assert found
    for row in found:
        assert row["source"]
        assert None not in row
        assert None not in row.values()
        for column in row.keys() - WORDS:
            assert not row[column] or float(row[column]) > 0, (row, column)


def test_zero_table_is_what_its_formula_gives() -> None:
    found = reference("zero_table1.csv")
    assert len(found) == 18
    for row in found:
        size, ranks = float(row["parameters"]) / 1e9, int(row["dp"])
        for column, expected in (
            ("p_os_gb", 4 * size + 12 * size / ranks),
            ("p_os_g_gb", 2 * size + 14 * size / ranks),
            ("p_os_g_p_gb", 16 * size / ranks),
        ):
            assert float(row[column]) == pytest.approx(expected, rel=0.025), (row, column)


def test_other_runs_print_the_utilisation_that_their_tokens_give() -> None:
    """MFU counts 6 FLOPs per parameter and token, and attention's; of 7B at 32768 tokens those are 56 %."""
    peaks = {"H100": 989.5e12, "A100": 312e12}
    checked = 0
    for row in reference("other_runs.csv"):
        if row["mfu"] and row["parameters"]:
            share = 6 * float(row["parameters"]) * float(row["tokens_per_s_per_gpu"]) / peaks[row["device"][:4]]
            # What attention adds is less than all the rest, up to 32768 tokens.
            assert 0.43 < share / float(row["mfu"]) <= 1.01, row
            checked += 1
    assert checked > 40


def test_inter_node_factors_give_the_collectives_that_they_are_from() -> None:
    found = efficiency_of(H100, Numbers.bf16)
    link = 400e9  # bytes per second each way, of a p5.48xlarge
    errors = []
    for row in reference("collectives_p5.csv"):
        ranks, size = int(row["gpus"]), float(row["size_mib"]) * 2**20
        moved = size * (ranks - 1) / ranks * (2 if row["collective"] == "all_reduce" else 1)
        expected = found.inter_step_s * (ranks - 1) + moved / (link * found.inter_collective)
        ratio = expected * float(row["algorithm_gb_per_s"]) * 1e9 / size
        if row["collective"] == "all_gather":
            errors.append(math.log(ratio))
            assert 0.75 < ratio < 1.2, row
        elif size >= 128 * 2**20:
            assert 0.75 < ratio < 1.4, row
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.1


def test_passes_of_a_step_reach_a_part_of_what_their_operators_reach_alone() -> None:
    passes = [(Stage(before=0, peak=0, calls=(Call(Kind.matmul, flops, 8),), moments=()),) for flops in (2e12, 4e12)]
    trace = Trace(forward=passes[0], backward=passes[1], micro_batch=1, num_tokens=1)
    machines, factors = Cluster(instance="p5.48xlarge").facts(Numbers.bf16), efficiency_of(H100, Numbers.bf16)
    found = compute(trace, machines, factors)
    assert found is not None
    assert 0.8 < factors.in_step < 1
    assert found.forward_s == pytest.approx(2e12 / (machines.peak_flops * factors.matmul * factors.in_step))
    assert found.backward_s == pytest.approx(2 * found.forward_s)
