"""Factors learnt from runs, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from strategies.base import Plan, Strategy, WorldSpec
from strategies.ddp import DDPStrategy
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from strategies.single import SingleStrategy
from strategies.testing import Workers
from tests.trainer.jobs import TINY, fit
from trainer.config import compose, made
from trainer.planner.beside import Prediction
from trainer.planner.calibrate import FILE, Calibration, Run, learn
from trainer.planner.cluster import Cluster
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.facts import ModelFacts, facts_of
from trainer.planner.work import Rates, Work, read_work

H100 = "H100 80GB HBM3"
FP32 = Numbers.fp32
FACTORS = efficiency_of(H100, FP32)
COMPUTING = ("matmul", "attention_forward", "attention_backward", "memory")


def slower(factors: Efficiency, rates: Sequence[str], times: Sequence[str], part: float) -> Efficiency:
    """Rates multiplied by `part`, and times divided by it."""
    changed = {name: part * getattr(factors, name) for name in rates}
    return factors.with_factors(**changed, **{name: getattr(factors, name) / part for name in times})


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    model = made(compose([*TINY, "model.config.hidden_size=256", "model.config.vocab_size=256"]).model)
    model.prepare(None)
    return facts_of(model, 2.0, Precision(), length=256, device="cuda")


def work_of(facts: ModelFacts, strategy: Strategy, devices: int, nodes: int = 1, device: str = H100) -> Work:
    known: dict[str, Any] = {} if device == H100 else {"peak_tflops": 0.2, "memory_gib": 8, "memory_gb_per_s": 10.0}
    cluster = Cluster(device=device, devices=devices, nodes=nodes, link_gb_per_s=400.0, network_gbps=400.0, **known)
    plan = Plan(micro_batch=64)
    world = WorldSpec(size=nodes * devices, local_size=devices)
    return Work(
        trace=facts.trace(64, None),
        footprint=strategy.footprint(facts.spec, world, plan),
        plan=plan,
        machines=cluster.facts(FP32),
        numbers="fp32",
    )


def ran(folder: Path, work: Work, truth: Efficiency, wait_s: float = 0.0) -> Path:
    """A run's folder as if each step had taken what `truth` says, and `wait_s` for data."""
    folder.mkdir()
    found = work.speed(truth)
    assert found is not None
    prediction = Prediction(memory_bytes=1, step_s=found.step_s, work=work, factors=FACTORS)
    prediction.write(folder)
    window = {
        "step_s": found.step_s + wait_s,
        "data_s": wait_s,
        "compute_s": found.compute_s + found.optimizer_s,
        "communication_s": found.exposed_s,
        "communication_total_s": found.communication_s,
    }
    prediction.note({**window, "step_s": 100.0})  # the first isn't like the others
    prediction.note(window)
    (folder / "summary.json").write_text(json.dumps(prediction.beside(1.0)))
    return folder


def test_work_read_again_takes_the_same_time(facts: ModelFacts, tmp_path: Path) -> None:
    work = work_of(facts, DDPStrategy(), 8, nodes=2)
    ran(tmp_path / "run", work, FACTORS)
    again, factors = read_work(tmp_path / "run")
    assert again.speed(factors) == work.speed(FACTORS)
    assert (tmp_path / "run" / "prediction.json").stat().st_size < 50_000


@pytest.mark.parametrize("nodes", [1, 2])
def test_factors_learnt_from_a_run_are_those_that_it_ran_with(facts: ModelFacts, tmp_path: Path, nodes: int) -> None:
    rates = {1: ("intra_collective", "intra_all_reduce"), 2: ("inter_collective",)}[nodes]
    times = {1: ("intra_latency_s",), 2: ("inter_latency_s", "inter_step_s")}[nodes]
    truth = slower(slower(FACTORS, COMPUTING, ("launch_s",), 0.5), rates, times, 0.4)
    run = ran(tmp_path / "run", work_of(facts, DDPStrategy(), 8, nodes), truth)
    found, lines = learn([run], tmp_path / FILE)
    learnt = found.applied(FACTORS, FP32)
    [entry] = found.entries
    assert entry.error_percent["before"] > 30
    assert entry.error_percent["after"] < 5
    assert learnt.matmul == pytest.approx(truth.matmul, rel=0.05)
    assert getattr(learnt, rates[0]) == pytest.approx(getattr(truth, rates[0]), rel=0.05)
    untouched = "inter_collective" if nodes == 1 else "intra_collective"
    assert getattr(learnt, untouched) == getattr(FACTORS, untouched)
    assert lines[0].startswith(f"{H100} in fp32, from 1 run: matmul=")
    assert lines[-1].endswith(" after")


def test_factors_of_several_runs_are_between_theirs(facts: ModelFacts, tmp_path: Path) -> None:
    work = work_of(facts, SingleStrategy(), 1)
    runs = [ran(tmp_path / str(part), work, slower(FACTORS, COMPUTING, ("launch_s",), part)) for part in (0.4, 0.6)]
    found, _ = learn(runs, tmp_path / FILE)
    assert found.applied(FACTORS, FP32).matmul == pytest.approx((0.4 * 0.6) ** 0.5 * FACTORS.matmul, rel=0.01)


def test_calibration_read_again_is_the_same_and_brings_rates_of_an_unknown_device(
    facts: ModelFacts, tmp_path: Path
) -> None:
    slow = efficiency_of("cpu", FP32)
    work = work_of(facts, SingleStrategy(), 1, device="cpu")
    found, _ = learn([ran(tmp_path / "run", work, slow)], tmp_path / FILE)
    found.write()
    again = Calibration.read(tmp_path / FILE)
    assert [asdict(each) for each in again.entries] == json.loads(json.dumps([asdict(each) for each in found.entries]))
    rates = again.rates(None, "cpu", FP32, size=4, local_size=2)
    assert isinstance(rates, Rates)
    assert (rates.machines.nodes, rates.machines.devices, rates.machines.peak_flops) == (2, 2, 0.2e12)
    with pytest.raises(ConfigError, match=r"has nothing on H100 80GB HBM3 in fp32, only on cpu in fp32"):
        again.applied(FACTORS, FP32)


def test_real_run_is_predicted_better_after_it_was_learnt_from(
    workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli import main

    run = tmp_path / "run"
    words = [*TINY, "strategy=auto", "trainer.log_every=2", "data.length=16", "trainer.max_steps=8"]
    answers = workers.run(fit, 2, str(run), words, timeout=120)
    assert "error" not in answers[0], answers[0]
    with pytest.raises(SystemExit) as end:
        main(["plan", "--calibrate", str(run), f"run.dir={tmp_path}"])
    assert end.value.code == 0
    out, _ = capsys.readouterr()
    assert "mean error of a step's time: " in out
    calibration = Calibration.read(tmp_path / FILE)
    [entry] = calibration.entries
    assert (entry.device, entry.numbers) == ("cpu", "fp32")
    assert entry.error_percent["after"] < entry.error_percent["before"]
    first = Run.read(run)
    again = first.error(calibration.applied(efficiency_of("cpu", FP32), FP32))
    assert abs(again) == pytest.approx(entry.error_percent["after"])
    # A later run that isn't measured before it starts has its time predicted all the same.
    [answer] = workers.run(
        fit, 1, str(tmp_path / "later"), [*words, "strategy=ddp", f"trainer.calibration={tmp_path / FILE}"]
    )
    assert "error" not in answer, answer
    assert json.loads((tmp_path / "later" / "summary.json").read_text())["predicted"]["step_s"] > 0


def test_plan_with_a_calibration_is_slower_where_the_run_was(
    facts: ModelFacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli import main

    truth = slower(FACTORS, COMPUTING, ("launch_s",), 0.5)
    run = ran(tmp_path / "run", work_of(facts, SingleStrategy(), 1), truth)
    learn([run], tmp_path / FILE)[0].write()
    found = []
    for more in ([], [f"--calibration={tmp_path / FILE}"]):
        machines = ("cluster=custom", f"cluster.device={H100}", "cluster.devices=1")
        with pytest.raises(SystemExit) as end:
            main(["plan", *more, f"run.dir={tmp_path}", "strategy=single", *TINY, *machines])
        assert end.value.code == 0, capsys.readouterr()
        [candidate] = json.loads((tmp_path / "plan.json").read_text())["candidates"]
        found.append(candidate)
    before, after = (json.dumps(each) for each in found)
    assert before != after


SUMMARY = json.dumps({"measured": {"memory_bytes": 1}})
WRONG: list[tuple[dict[str, str], str]] = [
    ({}, r"has no prediction\.json: it is no run's folder"),
    ({"prediction.json": "{"}, r"prediction\.json can't be read"),
    ({"prediction.json": '{"format": 99}'}, r"its format is 99"),
    ({"prediction.json": "", "summary.json": ""}, r"has no summary\.json, so the run hasn't ended"),
    ({"prediction.json": "", "summary.json": "{}"}, r"has no measured times"),
    ({"prediction.json": "", "summary.json": SUMMARY}, r"was too short: .*\(trainer\.max_steps, trainer\.log_every\)"),
]


@pytest.mark.parametrize(("files", "said"), WRONG, ids=[said for _, said in WRONG])
def test_run_that_nothing_can_be_learnt_from_is_refused(
    facts: ModelFacts, tmp_path: Path, files: dict[str, str], said: str
) -> None:
    run = ran(tmp_path / "run", work_of(facts, SingleStrategy(), 1), FACTORS)
    kept = (run / "prediction.json").read_text()
    for path in run.iterdir():
        path.unlink()
    for name, text in files.items():
        if text or name == "prediction.json":
            (run / name).write_text(text or kept)
    with pytest.raises(ConfigError, match=said) as caught:
        learn([run], tmp_path / FILE)
    assert "\n" not in str(caught.value)
    assert "--calibrate" in str(caught.value) or "trainer." in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 1}', '{"format": 1, "entries": [{"device": "cpu", "numbers": "fp33", "factors": {}}]}',
     '{"format": 1, "entries": [{"device": "cpu", "numbers": "fp32", "factors": {"matmul": -1}}]}'],
)  # fmt: skip
def test_calibration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError) as caught:
        Calibration.read(tmp_path / FILE)
    assert "\n" not in str(caught.value)


def test_prediction_of_a_device_without_rates_is_not_kept(tmp_path: Path) -> None:
    Prediction(memory_bytes=1, step_s=None).write(tmp_path)
    assert not [*tmp_path.iterdir()]
