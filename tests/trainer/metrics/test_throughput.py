"""MFU: known peaks only, and the published formula."""

from __future__ import annotations

import pytest
import torch

from strategies.precision import Numbers
from trainer.metrics.memory import peak_memory_mib
from trainer.metrics.throughput import flops_utilisation, peak_flops, peak_flops_of, training_flops_per_token


@pytest.mark.parametrize(
    ("name", "numbers", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", Numbers.bf16, 312),
        ("NVIDIA A100-SXM4-80GB", Numbers.tf32, 156),
        ("NVIDIA A100-SXM4-80GB", Numbers.fp32, 19.5),
        ("NVIDIA A10G", Numbers.bf16, 70),
        ("NVIDIA A10", Numbers.bf16, 125),
        ("NVIDIA H100 80GB HBM3", Numbers.bf16, 989.5),
        ("NVIDIA H100 PCIe", Numbers.bf16, 756.5),
        ("NVIDIA H200", Numbers.bf16, 989.5),
        ("NVIDIA H200 NVL", Numbers.bf16, 835.5),
        ("NVIDIA GH200 480GB", Numbers.fp16, 989.5),
        ("NVIDIA B200", Numbers.bf16, 2250),
        ("NVIDIA B300 SXM6 AC", Numbers.bf16, 2250),
        ("NVIDIA B300 SXM6 AC", Numbers.fp64, 1.25),
        ("Trainium", Numbers.bf16, 190),
        ("Trainium", Numbers.fp32, 47.5),
        ("NVIDIA L4", Numbers.bf16, 121),
        ("NVIDIA L40S", Numbers.bf16, 362),
        ("Tesla V100-SXM2-16GB", Numbers.fp16, 125),
        ("Tesla V100-PCIE-32GB", Numbers.fp16, 112),
        ("Tesla T4", Numbers.fp16, 65),
    ],
)
def test_peak_known_device_is_its_dense_rate(name: str, numbers: Numbers, tera: float) -> None:
    assert peak_flops_of(name, numbers) == tera * 1e12


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("NVIDIA GeForce RTX 9999", Numbers.bf16),
        ("NVIDIA A1000", Numbers.bf16),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", Numbers.bf16),
        ("Tesla V100-SXM2-16GB", Numbers.bf16),
        ("Tesla T4", Numbers.tf32),
        ("NVIDIA L4", Numbers.fp64),
    ],
)
def test_peak_unknown_device_or_numbers_is_none(name: str, numbers: Numbers) -> None:
    assert peak_flops_of(name, numbers) is None


def test_peak_of_cpu_is_none() -> None:
    assert peak_flops(torch.device("cpu"), Numbers.fp32) is None


def test_flops_per_token_agree_with_a_count_of_matrix_products() -> None:
    layers, width, sequence, vocabulary = 2, 8, 4, 16
    parameters = layers * 4 * width * width + width * vocabulary
    counted = 0
    for _ in range(layers):
        counted += 4 * 2 * sequence * width * width  # query, key, value, output
        counted += 2 * 2 * sequence * sequence * width  # scores, and values by them
    counted += 2 * sequence * width * vocabulary
    found = training_flops_per_token(parameters, layers=layers, width=width, sequence=sequence)
    assert found * sequence == 3 * counted


def test_flops_per_token_frozen_parameters_need_no_weight_gradient() -> None:
    assert training_flops_per_token(1000, num_trainable=10) == 4020


def test_utilisation_counts_every_device() -> None:
    assert flops_utilisation(1000, 6e9, 1e13, 2) == pytest.approx(0.3)


def test_peak_memory_on_cpu_is_at_least_what_is_held() -> None:
    held = torch.ones(25, 2**20, dtype=torch.uint8)
    assert peak_memory_mib(torch.device("cpu")) > held.nbytes / 2**20
