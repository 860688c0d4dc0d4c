"""The predicted peak of a training step, held against CUDA's allocator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strategies.testing import Workers
from tests.trainer.planner.measured_peaks import CASES, SUBJECTS, peak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WITHIN = 0.08


@pytest.mark.parametrize("numbers", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_peak_of_a_step_on_a_gpu_is_what_is_predicted(workers: Workers, name: str, numbers: str) -> None:
    case = replace(CASES[name], numbers=numbers, more_samples=16)
    [found] = workers.run(peak, 1, case, "cuda")
    assert found.predicted == pytest.approx(found.measured, rel=WITHIN), found.parts
