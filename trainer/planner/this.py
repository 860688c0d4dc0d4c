"""The machine at hand, measured in a few seconds: what a plan for it starts from."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import psutil
import torch

from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from trainer.metrics.throughput import peak_flops
from trainer.planner.devices import device_called

Fact: TypeAlias = tuple[float, str]
"""A number in the unit of its key, and its source."""

_EACH_S = 0.3
_LINK_LIMIT_S = 60.0
_WIDTH = {"cuda": 8192, "cpu": 512}
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes: far more than caches hold."""
_QUICK_S = 0.1
_QUICK_COPIED = {"cuda": 1 << 28, "cpu": 1 << 25}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One machine."""

    device: str
    facts: Mapping[str, Fact]
    """By the keys of `cluster`."""
    line: str
    """What was measured, for people."""


@functools.cache
def measured(numbers: Numbers, devices: int | None) -> Measured:
    """Measure this machine, once for each precision and number of devices.

    A GPU whose peak is published keeps that one, so that it means the same here as elsewhere. On processors each rank
    gets its part of the threads and of the memory that is free now.

    Args:
        numbers: what the matrix products are in.
        devices: None: all GPUs, or one rank on the processors.

    Raises:
        ConfigError: there aren't as many GPUs, or they can't compute in `numbers`.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    Precision(numbers=numbers).check(torch.device(kind))
    free, disk = psutil.virtual_memory().available, shutil.disk_usage(Path.cwd()).free
    found = _gpus(numbers, devices) if kind == "cuda" else _processors(numbers, devices or 1, free)
    facts = {
        **found.facts,
        "host_memory_gib": (free / 2**30, "free now"),
        "disk_gb": (disk / 1e9, f"free now in {Path.cwd()}"),
    }
    line = f"{found.line}; {free / 2**30:,.1f} GiB of host memory and {disk / 1e9:,.0f} GB of disk are free"
    return Measured(device=found.device, facts=facts, line=line)


def own_rates(device: torch.device, numbers: Numbers) -> tuple[float, float]:
    """FLOP/s of matrix products in `numbers`, and bytes per second of a copy, of this process with its threads.

    Quick, and small: it may be about to train.
    """
    found = _flops(device, numbers, _QUICK_S), _copy_rate(device, _QUICK_COPIED[device.type], _QUICK_S)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def _gpus(numbers: Numbers, devices: int | None) -> Measured:
    there = torch.cuda.device_count()
    if devices is not None and devices > there:
        raise ConfigError(f"Cluster: devices={devices}, and this machine has {there}. Take fewer (cluster.devices).")
    count = devices or there
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    rate, copied, host = _flops(device, numbers), _copy_rate(device), _host_rate(device)
    peak = peak_flops(device, numbers)
    facts: dict[str, Fact] = {
        "devices": (count, "CUDA"),
        "memory_gib": (memory / 2**30, "CUDA's total memory of the first"),
        "peak_tflops": (rate / 1e12, "measured matrix products") if peak is None else (peak / 1e12, "the datasheet"),
        "memory_gb_per_s": (copied / 1e9, "a measured copy"),
        "host_link_gb_per_s": (host / 1e9, "a measured copy from pinned memory"),
    }
    link = ""
    if count > 1:
        between = _between_rate()
        facts["link_gb_per_s"] = (between / 1e9, "a measured copy between the first two GPUs")
        link = f", {between / 1e9:,.0f} GB/s to the next"
    if (known := device_called(name)) is not None and known.power_w is not None:
        facts["power_w"] = (known.power_w, f"trainer/planner/devices.csv: {known.source}")
    of = "" if peak is None else f" of {peak / 1e12:,.0f}"
    line = (
        f"measured here: {count} x {name}, each {memory / 2**30:,.1f} GiB, {rate / 1e12:,.1f}{of} TFLOP/s in "
        f"{numbers.name}, memory {copied / 1e9:,.0f} GB/s, from the host {host / 1e9:,.1f} GB/s{link}"
    )
    return Measured(device=name, facts=facts, line=line)


def _processors(numbers: Numbers, ranks: int, free: int) -> Measured:
    threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks))
    memory = free / ranks
    device = torch.device("cpu")
    with _threads(threads):
        rate, copied = _flops(device, numbers), _copy_rate(device)
    facts: dict[str, Fact] = {
        "devices": (ranks, "yours (cluster.devices)" if ranks > 1 else "one rank on the processors"),
        "memory_gib": (memory / 2**30, "memory that is free now" + (", divided among the ranks" if ranks > 1 else "")),
        "peak_tflops": (rate / 1e12, f"measured matrix products, {threads} threads"),
        "memory_gb_per_s": (copied / 1e9, "a measured copy"),
    }
    link = ""
    if ranks > 1:
        between = _gloo_rate()
        facts["link_gb_per_s"] = (between / 1e9, "a measured all-reduce of two processes over Gloo")
        link = f", all-reduce {between / 1e9:,.2f} GB/s"
    line = (
        f"measured here: {ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}, each "
        f"{memory / 2**30:,.1f} GiB, {rate / 1e12:,.3f} TFLOP/s in {numbers.name}, "
        f"memory {copied / 1e9:,.1f} GB/s{link}"
    )
    return Measured(device="cpu", facts=facts, line=line)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flops(device: torch.device, numbers: Numbers, each_s: float | None = None) -> float:
    """FLOP/s of matrix products; the best turn, so that a hiccup doesn't count."""
    width = _WIDTH[device.type]
    precision = Precision(numbers=numbers)
    a = torch.ones(width, width, device=device, dtype=precision.compute_dtype)
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if numbers is Numbers.tf32 else "highest")
    try:
        return 2.0 * width**3 / _seconds(device, lambda: torch.mm(a, a, out=out), each_s)
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_rate(device: torch.device, copied: int | None = None, each_s: float | None = None) -> float:
    """Bytes per second that memory reads and writes together."""
    source = torch.ones((copied or _COPIED[device.type]) // 4, device=device)
    into = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(device, lambda: into.copy_(source), each_s)


def _host_rate(device: torch.device) -> float:
    source = torch.ones(1 << 26, dtype=torch.float32).pin_memory()
    into = torch.empty_like(source, device=device)
    return source.nbytes / _seconds(device, lambda: into.copy_(source, non_blocking=True))


def _between_rate() -> float:
    source = torch.ones(1 << 26, device="cuda:0")
    into = torch.empty_like(source, device="cuda:1")

    def copy() -> None:
        into.copy_(source)
        torch.cuda.synchronize(1)

    return source.nbytes / _seconds(source.device, copy)


def _seconds(device: torch.device, run: Callable[[], object], each_s: float | None = None) -> float:
    """Of one turn: the best of those that fit, after one to warm up."""

    def turn() -> float:
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    turn()
    end, best = time.perf_counter() + (each_s or _EACH_S), turn()
    while time.perf_counter() < end:
        best = min(best, turn())
    return best


def _gloo_rate() -> float:
    """Bytes per second that one rank sends in an all-reduce of two, each in a process of its own.

    Raises:
        ConfigError: they didn't come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "trainer.planner.gloo", str(Path(folder, "store"))]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        both = [
            subprocess.Popen(
                [*words, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            said = [each.communicate(timeout=_LINK_LIMIT_S) for each in both]
        except subprocess.TimeoutExpired:
            said = []
        finally:
            for each in both:
                each.kill()
                each.wait()
    if not said or any(each.returncode for each in both):
        reason = said[0][1].strip().splitlines()[-1:] if said else [f"no answer in {_LINK_LIMIT_S:.0f} s"]
        raise ConfigError(
            f"Cluster: two processes can't be measured here: {''.join(reason)}. Give the rate (cluster.link_gb_per_s)."
        )
    return float(said[0][0])
