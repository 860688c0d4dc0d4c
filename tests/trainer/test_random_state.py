"""Random streams: kept and restored to the bit, and apart from each other."""

from __future__ import annotations

import random

import numpy as np
import torch

from trainer.random_state import capture, derive, restore, seed_all

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), float(np.random.standard_normal()), random.random(),
            random.gauss(0, 1)]  # fmt: skip


def test_restore_after_capture_gives_the_same_numbers() -> None:
    seed_all(3)
    draw()  # leaves half a pair of normal numbers in numpy's and Python's streams
    state = {name: value.clone() for name, value in capture(CPU).items()}
    first = draw()
    draw()
    restore(state, CPU)
    assert draw() == first


def test_derive_is_pure_and_keeps_streams_apart() -> None:
    assert derive(0, "rank", 1) == derive(0, "rank", 1)
    seeds = {derive(seed, "rank", rank, "step", step) for seed in range(3) for rank in range(4) for step in range(5)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)
