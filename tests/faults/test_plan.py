"""Plans of faults: the same from a seed or from JSON; what the kit does with them in one process."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from strategies.testing import Workers
from tests.faults import plan
from tests.faults.damaged_runs import fit_with_faults, learned
from tests.faults.kit import Kit
from tests.faults.plan import SAVE, Fault, from_json, to_json
from tests.trainer.jobs import ROWS, TINY, lines

WORDS = [*ROWS, "trainer.max_steps=6", "checkpoint.every=2", "trainer.eval_every=3"]


def test_plan_of_a_seed_is_always_the_same_and_survives_json() -> None:
    first = plan.kills(7, 200)
    assert plan.kills(7, 200) == first
    assert plan.kills(8, 200) != first
    assert from_json(to_json(first)) == first


def test_plan_of_200_kills_has_60_in_a_save_and_every_victim_in_turn() -> None:
    found = plan.kills(7, 200)
    assert sum(fault.phase in SAVE for fault in found) >= 60
    assert [fault.victim for fault in found[:4]] == ["rank 0", "rank 1", "launcher", "rank 0"]
    assert {fault.phase for fault in found} == set(plan.PHASES)


def test_fault_of_an_unknown_kind_or_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="Kinds: "):
        Fault(kind="flood")
    with pytest.raises(ValueError, match="phases: "):
        Fault(phase="lunch")


def test_kit_counts_phases_and_strikes_in_the_right_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kit = Kit([Fault(kind="error", phase="writing", occurrence=2)], rank=0, log=str(log))
    with kit.during("writing"), kit.during("publishing"):
        pass
    assert not log.exists()
    with pytest.raises(RuntimeError, match="writing"), kit.during("writing"):
        pass
    assert [json.loads(line)["phase"] for line in log.read_text().splitlines()] == ["writing"]


@pytest.mark.parametrize("fault", [{"witness": 1}, {"life": 1}])
def test_kit_leaves_faults_of_others_alone(fault: dict[str, Any]) -> None:
    with Kit([Fault(kind="error", phase="writing", **fault)], rank=0).during("writing"):
        pass


@pytest.mark.parametrize(("delay_s", "phase_s"), [(0.05, 5.0), (5.0, 0.05)])
def test_kit_sends_its_signal_inside_of_the_phase(delay_s: float, phase_s: float) -> None:
    heard: list[float] = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(time.monotonic()))
    begin = time.monotonic()
    try:
        with Kit([Fault(kind="term", phase="writing", delay_s=delay_s)], rank=0).during("writing"):
            while not heard and time.monotonic() < begin + phase_s:
                time.sleep(0.005)
        time.sleep(0)  # lets the handler run
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(heard) == 1
    assert 0.04 < heard[0] - begin < 2.0


@pytest.mark.parametrize(
    ("kind", "phase"),
    [("memory", "all_reduce"), ("memory", "evaluation"), ("memory", "staging"), ("full", "writing"),
     ("error", "tokenising")],
)  # fmt: skip
def test_kit_reaches_each_phase_of_a_run_and_all_ranks_end(
    workers: Workers, tmp_path: Path, kind: str, phase: str
) -> None:
    words, trainer, witness = WORDS, "Rows", 1
    if phase == "tokenising":
        words, trainer, witness = list(TINY), "Trainer", 0
    fault = Fault(kind=kind, phase=phase, witness=witness)
    outcomes = workers.outcomes(fit_with_faults, 2, str(tmp_path / "run"), words, to_json([fault]), trainer, timeout=60)
    for outcome in outcomes:
        assert outcome.error in (None, "MemoryError", "RuntimeError", "Died"), outcome  # none waits for ever
        assert outcome.error or outcome.value["error"] in ("TrainingError", "ConfigError"), outcome


def test_kit_nan_gradient_is_skipped_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    fault = Fault(kind="nan", phase="all_reduce", occurrence=4, witness=1)  # the second step's first micro-batch
    run = tmp_path / "run"
    answers = workers.run(fit_with_faults, 2, str(run), WORDS, to_json([fault]), timeout=60)
    assert [answer["progress"]["skipped"] for answer in answers] == [1, 1]
    assert str(lines(run)[1]["grad_norm"]) == "NaN"


def test_kit_slow_or_frozen_rank_changes_nothing_but_time(workers: Workers, tmp_path: Path) -> None:
    faults = [
        Fault(kind="slow", phase="all_reduce", occurrence=5, seconds=0.02, witness=1),
        Fault(kind="freeze", phase="evaluation", seconds=1.0, victim="rank 0"),
    ]
    begin = time.monotonic()
    workers.run(fit_with_faults, 2, str(tmp_path / "slow"), WORDS, to_json(faults), timeout=60)
    took = time.monotonic() - begin
    workers.run(fit_with_faults, 2, str(tmp_path / "plain"), WORDS, "[]", timeout=60)
    assert took > 1.0
    assert learned(tmp_path / "slow") == learned(tmp_path / "plain")
