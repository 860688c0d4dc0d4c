"""What a plan says: tables that fit the terminal, keys that train as planned, days and money, a picture."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from strategies.base import Collective, Footprint, ModelSpec, Plan, WorldSpec
from strategies.ddp import DDPStrategy
from trainer.cli import main
from trainer.commands.wanted import applied, wanted_of
from trainer.config import composed, made
from trainer.planner.cluster import Machines
from trainer.planner.efficiency import Efficiency, efficiency_of
from trainer.planner.report import Budget, Report, in_turn, training_words, words_of
from trainer.planner.search import Candidate, Wanted, search

TINY = (
    "data.length=16", "model.config.num_hidden_layers=2", "model.config.hidden_size=32",
    "model.config.intermediate_size=64", "cluster=p5", "precision=bf16",
)  # fmt: skip


def planned(*keys: str) -> tuple[Wanted, Machines, Efficiency]:
    config, choices = composed(keys)
    machines = made(config.cluster).facts(made(config.precision).numbers)
    factors = efficiency_of(machines.device, made(config.precision).numbers)
    return wanted_of(keys, config, machines, False, choices["strategy"]), machines, factors


@functools.cache
def everything() -> tuple[Wanted, tuple[Candidate, ...]]:
    wanted, machines, factors = planned(*TINY)
    return wanted, tuple(search(wanted, machines.on(2), factors)[0])


def report(nodes: Sequence[int] = (2,)) -> Report:
    wanted, candidates = everything()
    machines = candidates[0].machines
    found = {each: [replace(it, machines=machines.on(each)) for it in candidates] for each in nodes}
    factors = efficiency_of(machines.device, wanted.facts.precision.numbers)
    return Report(spec=wanted.facts.spec, keys=TINY, machines=machines, factors=factors, found=found)


def plan(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *words])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (code, "")
    return str(out)


def test_words_of_each_candidate_compose_to_that_very_plan() -> None:
    _, candidates = everything()
    assert len(candidates) > 16
    for it in (each for each in candidates if each.name != "mics"):
        config, choices = composed(applied(TINY, words_of(it).split()))
        trainer = made(config.trainer)
        assert choices["strategy"] == it.name
        assert made(config.strategy) == it.spread, it.strategy
        assert trainer.recomputing == it.plan.activation_checkpointing
        assert trainer.micro_batch == it.plan.micro_batch
        assert trainer.global_batch == it.plan.micro_batch * it.plan.accumulation * 16


def test_plan_of_the_words_of_its_best_gives_the_same_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keys = [*TINY, "trainer.global_batch=64", "strategy=fsdp_hybrid"]
    plan(capsys, *keys, f"run.dir={tmp_path / 'first'}")
    first = json.loads((tmp_path / "first" / "plan.json").read_text())
    plan(capsys, *applied(keys, first["best"]["keys"].split()), f"run.dir={tmp_path / 'second'}")
    second = json.loads((tmp_path / "second" / "plan.json").read_text())
    assert first["best"]["mesh"]["replicate"] * first["best"]["mesh"]["shard"] == 8
    for key in ("bytes_per_rank", "speed", "usd_per_billion_tokens", "micro_batch", "accumulation", "mesh"):
        assert second["best"][key] == first["best"][key], key


def test_training_words_leave_out_the_cluster_and_what_is_decided() -> None:
    _, candidates = everything()
    keys = [*TINY, "cluster.nodes=2", "run.dir=plans/a", "strategy=ddp", "trainer.micro_batch=3", "optimizer.lr=1e-3"]
    words = training_words(keys, candidates[0])
    names = [word.partition("=")[0] for word in words]
    assert len(set(names)) == len(names)
    assert not {"cluster", "cluster.nodes", "run.dir"} & set(names)
    assert {"optimizer.lr=1e-3", "precision=bf16", f"strategy={candidates[0].name}"} <= set(words)


def test_report_best_is_on_the_fewest_nodes_where_something_fits() -> None:
    found = report((1, 2, 4))
    found.found[1] = [replace(it, fits=False) for it in found.found[1]]
    assert found.best is found.found[2][0]
    found.found[2] = found.found[4] = []
    assert found.best is None
    assert found.nodes == 4


def test_in_turn_shows_every_strategy_before_a_second_setting_of_one() -> None:
    _, candidates = everything()
    first, others = in_turn(candidates)
    assert len({it.name for it in first}) == len(first) == len({it.name for it in candidates})
    assert others
    assert all(it.name in ("fsdp_hybrid", "mics") for it in others)
    for name in ("fsdp_hybrid", "mics"):
        assert next(it for it in candidates if it.name == name) in first


def test_search_prefers_fewer_libraries_where_speed_tells_nothing() -> None:
    _, candidates = everything()
    fastest = max(it.speed.tokens_per_s for it in candidates if it.speed is not None)
    assert candidates[0].speed is not None
    assert candidates[0].speed.tokens_per_s >= 0.99 * fastest
    assert not candidates[0].spread.libraries


def test_budget_adds_overhead_and_what_starts_cost() -> None:
    assert Budget(tokens=8.64e9).days(1e5) == pytest.approx(1.0)
    assert Budget(tokens=8.64e9, overhead=0.2).days(1e5) == pytest.approx(1.25)
    assert Budget(tokens=8.64e9, warm_up_h=0.5, starts=4).days(1e5) == pytest.approx(1 + 2 / 24)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from trainer.planner.table import show

    monkeypatch.setenv("COLUMNS", str(width))
    found = report((1, 2, 1024))
    found.budget = Budget(tokens=1e12)
    found.found[1][3:] = [replace(it, fits=False, why_not="200.0 GiB of 79.2 per device") for it in found.found[1][3:]]
    show(found, top=40)
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > width and not line.startswith("train it")]
    assert not [line for line in lines if "…" in line]
    text = "\n".join(lines)
    for it in found.found[1]:
        assert it.strategy.split("=")[-1] in text
    assert "200.0 GiB of 79.2 per device: " in text
    assert lines.index(next(line for line in lines if line.startswith("doesn't fit"))) > 3


@pytest.mark.parametrize(("room", "tight"), [(1.05, True), (1.2, False)])
def test_best_that_leaves_little_memory_is_said_to_be_tight(
    capsys: pytest.CaptureFixture[str], room: float, tight: bool
) -> None:
    from trainer.planner.table import show

    found = report()
    best = found.found[2][0]
    limit = int(room * best.memory.in_use)
    found.found[2] = [replace(best, machines=replace(best.machines, memory_bytes=limit))]
    show(found, top=None)
    assert ("tight: 95% of a device's memory" in capsys.readouterr().out) is tight


def test_plan_with_tokens_spot_and_starts_says_days_and_money(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("strategy=ddp", "trainer.micro_batch=1", "--tokens", "1e12", "--overhead", "0.1", "--spot", "0.5")
    out = plan(capsys, *TINY, *words, "--warm-up", "30", "--starts", "4", f"run.dir={tmp_path}")
    best = json.loads((tmp_path / "plan.json").read_text())["best"]
    days = 1e12 / best["speed"]["tokens_per_s"] / 86400 / 0.9 + 4 * 0.5 / 24
    assert best["days"] == pytest.approx(days)
    assert best["usd_per_h"] == pytest.approx(55.04 / 2)
    assert best["usd"] == pytest.approx(days * 24 * best["usd_per_h"])
    assert "0.5 of EC2 on-demand" in out
    assert f"{best['usd']:,.0f} USD" in out


def test_draw_writes_a_picture_of_nodes_compared_and_of_memory_alone(tmp_path: Path) -> None:
    from trainer.planner.picture import draw
    from trainer.planner.search import without_machines

    draw(report((1, 2, 4)), tmp_path / "several.svg")
    text = (tmp_path / "several.svg").read_text()
    assert text.count("<!-- fsdp_hybrid shard_size=") >= 1
    assert "<!-- USD per 10^9 tokens -->" in text
    wanted, _ = everything()
    alone = Report(spec=wanted.facts.spec, ranks=4, memory_only=without_machines(wanted, 4)[0])
    draw(alone, tmp_path / "memory.svg")
    assert "MiB per device" in (tmp_path / "memory.svg").read_text()


def test_plan_simulate_agrees_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [key for key in TINY if not key.startswith("cluster")]
    out = plan(capsys, *keys, "strategy=ddp", "--ranks", "8", "trainer.global_batch=64", "trainer.micro_batch=1",
               "--simulate")  # fmt: skip
    assert "2 of its 8 micro-batches" in out
    assert "predicted as it is" in out


def test_plan_simulate_of_a_wrong_prediction_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DDPStrategy.footprint

    def wrong(self: DDPStrategy, model: ModelSpec, world: WorldSpec, plan: Plan) -> Footprint:
        found = right(self, model, world, plan)
        extra = Collective(kind="all_reduce", payload_bytes=4, count=1, ranks=world.size)
        return replace(found, collectives=(*found.collectives, extra))

    monkeypatch.setattr(DDPStrategy, "footprint", wrong)
    keys = [key for key in TINY if not key.startswith("cluster")]
    out = plan(capsys, *keys, "strategy=ddp", "--ranks", "8", "--simulate", code=1)
    assert "the prediction is wrong" in out


def test_plan_simulate_of_a_library_that_needs_its_ranks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *TINY, "strategy=zero1", "--simulate"])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert "zero1" in err
    assert "(--simulate, strategy)" in err
