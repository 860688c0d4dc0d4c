"""Model FLOPs utilisation, on devices whose peak is published; nowhere else.

The peaks are dense ones: datasheets print the Tensor Core rates with 2:4 sparsity, twice as high.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from strategies.precision import Numbers

_TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense peak rates of one device in TFLOP/s; None: it can't, or nothing is published."""

    pattern: str
    """A regular expression that the device's name holds."""
    half: float
    """fp16 with fp32 accumulation."""
    fp32: float
    """Without Tensor Cores."""
    bf16: bool = True
    """Whether bf16 runs as fast as fp16; else it isn't native."""
    tf32: float | None = None
    fp64: float | None = None
    """Through Tensor Cores where there are such."""


# From NVIDIA's datasheets of each product (B300, B200 and GB200: of HGX B300, HGX B200 and GB200 NVL72), Trainium
# from the Neuron documentation. The first pattern that is found counts, so variants stand before the plain name.
_PEAKS = (
    Peak(pattern=r"\bGB200\b", half=2500, tf32=1250, fp32=80, fp64=40),
    Peak(pattern=r"\bB300\b", half=2250, tf32=1125, fp32=75, fp64=1.25),
    Peak(pattern=r"\bB200\b", half=2250, tf32=1100, fp32=75, fp64=37),
    Peak(pattern=r"\bH200 NVL\b", half=835.5, tf32=417.5, fp32=60, fp64=60),
    Peak(pattern=r"\b(GH200|H200)\b", half=989.5, tf32=494.7, fp32=67, fp64=67),
    Peak(pattern=r"\bH100 NVL\b", half=835.5, tf32=417.5, fp32=60, fp64=60),
    Peak(pattern=r"\bH100 PCIe\b", half=756.5, tf32=378, fp32=51, fp64=51),
    Peak(pattern=r"\bH100\b", half=989.5, tf32=494.7, fp32=67, fp64=67),
    Peak(pattern=r"\bH800\b", half=989.5, tf32=494.7, fp32=67, fp64=1),
    Peak(pattern=r"\bA100\b", half=312, tf32=156, fp32=19.5, fp64=19.5),
    Peak(pattern=r"\bA800\b", half=312, tf32=156, fp32=19.5, fp64=19.5),
    Peak(pattern=r"\bA40\b", half=149.7, tf32=74.8, fp32=37.4),
    Peak(pattern=r"\bA30\b", half=165, tf32=82, fp32=10.3, fp64=10.3),
    Peak(pattern=r"\bA10G\b", half=70, tf32=35, fp32=35),
    Peak(pattern=r"\bA10\b", half=125, tf32=62.5, fp32=31.2),
    Peak(pattern=r"\bL40S\b", half=362, tf32=183, fp32=91.6),
    Peak(pattern=r"\bL40\b", half=181, tf32=90.5, fp32=90.5),
    Peak(pattern=r"\bL4\b", half=121, tf32=60, fp32=30.3),
    Peak(pattern=r"\bV100S", half=130, fp32=16.4, fp64=8.2, bf16=False),
    Peak(pattern=r"\bV100-PCIE", half=112, fp32=14, fp64=7, bf16=False),
    Peak(pattern=r"\bV100", half=125, fp32=15.7, fp64=7.8, bf16=False),
    Peak(pattern=r"\bT4\b", half=65, fp32=8.1, bf16=False),
    Peak(pattern=r"\bTrainium\b", half=190, tf32=190, fp32=47.5),
)


def peak_flops_of(name: str, numbers: Numbers) -> float | None:
    """Dense peak in FLOP/s of the device called `name` for matrix products in `numbers`; None: not known.

    A slice of a device (MIG) has no known peak.
    """
    if "MIG" in name.split():
        return None
    found = next((peak for peak in _PEAKS if re.search(peak.pattern, name)), None)
    if found is None:
        return None
    rate = {
        Numbers.fp64: found.fp64,
        Numbers.fp32: found.fp32,
        Numbers.tf32: found.tf32,
        Numbers.fp16: found.half,
        Numbers.bf16: found.half if found.bf16 else None,
    }[numbers]
    return None if rate is None else rate * _TERA


def peak_flops(device: torch.device, numbers: Numbers) -> float | None:
    """Dense peak of `device` in FLOP/s for matrix products in `numbers`; None: not known, no MFU then."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), numbers)


def training_flops_per_token(
    num_parameters: int,
    *,
    num_trainable: int | None = None,
    layers: int = 0,
    width: int = 0,
    sequence: int = 0,
) -> float:
    """FLOPs that training on one token takes: `6 N + 12 L W T`.

    Six per parameter: a multiplication and an addition, forward once and backward twice (for the
    inputs and for the weights; frozen parameters need only the former). Attention adds, per layer,
    products of queries with keys and of weights with values over the whole sequence; it isn't halved
    for the causal mask, and recomputation isn't counted, so that numbers compare with published ones.

    Args:
        num_parameters: N, those that take part in matrix products: the input embedding only if it is
            tied to the output's.
        num_trainable: of these; None: all.
        layers: L, with attention.
        width: W, heads times the size of a head.
        sequence: T, tokens that attend to each other.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    trainable = num_parameters if num_trainable is None else num_trainable
    return 4.0 * num_parameters + 2.0 * trainable + 12.0 * layers * width * sequence


def flops_utilisation(tokens_per_s: float, flops_per_token: float, peak: float, world_size: int) -> float:
    """MFU: the part of the devices' peak that the model's own FLOPs make up, between 0 and 1.

    Args:
        tokens_per_s: of all ranks together.
        flops_per_token: from `training_flops_per_token`.
        peak: FLOP/s of one device, from `peak_flops`.
        world_size: devices.
    """
    return tokens_per_s * flops_per_token / (peak * world_size)
