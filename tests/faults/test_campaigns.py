"""The campaigns in short: real launches that are killed, stopped and restarted, and end like the one left alone.

Those that stop and restart with SHARDWRIGHT_CAMPAIGNS=all. The long ones:
`python -m tests.faults.campaign kills --kills 200 --seed 7` (docs/faults.md).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.faults import plan
from tests.faults.campaign import Campaign, kills, main, restarts, terms
from tests.faults.plan import Fault

SEED = 11
EACH = pytest.mark.skipif(os.environ.get("SHARDWRIGHT_CAMPAIGNS") != "all", reason="SHARDWRIGHT_CAMPAIGNS=all runs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, for the uninterrupted run."""
    return tmp_path_factory.mktemp("campaigns")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_campaign_4_kills_change_nothing(folder: Path) -> None:
    campaign = Campaign(what="kills", folder=folder, seed=SEED)
    assert kills(campaign, plan.kills(SEED, 4)) == 0, campaign.problems
    told = json.loads((folder / "result.json").read_text())
    assert told["faults"] == 4
    assert told["in_a_save"] >= 2
    assert told["slowest_end_s"] <= 30


@EACH
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_campaign_terms_change_nothing(folder: Path) -> None:
    campaign = Campaign(what="terms", folder=folder, seed=SEED)
    assert terms(campaign, plan.terms(SEED, 2)) == 0, campaign.problems


@EACH
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_campaign_restarts_change_nothing(folder: Path) -> None:
    campaign = Campaign(what="restarts", folder=folder, seed=SEED)
    assert restarts(campaign, plan.deaths(SEED, 1)) == 0, campaign.problems


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_campaign_that_meets_a_difference_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = plan.to_json([Fault(kind="nan", phase="all_reduce", occurrence=9)])
    assert main(["restarts", "--faults", fault, "--folder", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "grad_norm nan" in said
    assert f"again: python -m tests.faults.campaign restarts --processes 2 --faults '{fault}'" in said
