"""Losses kept in the repository: fresh weights, data order, packing and the step mean today what they meant then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strategies.testing import Workers
from tests.trainer.jobs import TINY, fit, losses

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
MODEL = [override for override in TINY if not override.startswith("data")]


@pytest.mark.parametrize("name", ["answers_only", "packed_text"])
def test_losses_are_the_golden_ones(workers: Workers, tmp_path: Path, name: str) -> None:
    kept = json.loads((GOLDEN / f"{name}.json").read_text())
    data = [override.replace("docs/", f"{ROOT}/docs/") for override in kept["overrides"]]
    (answer,) = workers.run(fit, 1, str(tmp_path / "run"), [*MODEL, "data.length=16", *data])
    assert "error" not in answer, answer
    # Other processors add up in another order; a change of meaning is far larger than this.
    assert losses(tmp_path / "run") == pytest.approx(kept["losses"], abs=2e-4)
