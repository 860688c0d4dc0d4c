"""What is particular to DeepSpeed: settings, files, its own Adam, ranks that use other parameters, and its absence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from strategies import _testing_jobs as jobs
from strategies._deepspeed import operators
from strategies._testing_model import Job
from strategies.backends import GlooBackend
from strategies.base import ModelSpec, Plan, Strategy, Weights, WorldSpec
from strategies.deepspeed import DeepSpeedStrategy, Offload
from strategies.errors import ConfigError
from strategies.precision import Numbers, Precision
from strategies.testing import Recipe, Workers, check_numbers, check_tensors
from tests.strategies import test_surprises as surprises
from tests.strategies.test_deepspeed_config import CASES, FILES, SIZE, ours
from tests.strategies.test_footprint import Uneven, adamw, step
from trainer.config import compose, made
from trainer.optim import AdamWOptimizer

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"stage": 4}, "stage=4 is not 1, 2 or 3"),
        ({"bucket_mb": 0.0}, "bucket_mb=0.0 is not positive"),
        ({"stage": 3, "prefetch_mb": -1.0}, "prefetch_mb=-1.0 is not positive"),
        ({"prefetch_mb": 8.0}, "prefetch_mb=8.0 means nothing with stage=2"),
        ({"persist_numbers": 8}, "persist_numbers=8 means nothing with stage=2"),
        ({"offload_parameters": Offload.cpu}, "offload_parameters=cpu means nothing with stage=2"),
        ({"hpz": True}, "hpz=True means nothing with stage=2"),
        ({"offload_optimizer": Offload.nvme}, "offload_optimizer=nvme means nothing with stage=2"),
        ({"sub_group_numbers": 8}, "sub_group_numbers=8 means nothing with stage=2"),
        ({"stage": 3, "sub_group_numbers": 0}, "sub_group_numbers=0 is below 1"),
        ({"stage": 3, "offload_parameters": Offload.nvme}, "offload_parameters=nvme with offload_optimizer=none"),
        ({"stage": 3, "nvme_path": "/x"}, "nvme_path=/x means nothing with offload_optimizer=none"),
        ({"stage": 3, "hpz_size": 2}, "hpz_size=2 means nothing with hpz=false"),
        ({"stage": 3, "hpz": True, "hpz_size": 1}, "hpz_size=1 is below 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        DeepSpeedStrategy(**settings)
    assert "(strategy." in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        ("zero1", {"stage": 1}),
        ("zero2", {"stage": 2}),
        ("zero3", {"stage": 3}),
        ("zero3_offload", {"stage": 3, "offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu}),
        ("zero_infinity", {"stage": 3, "offload_optimizer": Offload.nvme, "offload_parameters": Offload.nvme}),
        ("zero_hpz", {"stage": 3, "hpz": True}),
    ],
)
def test_choices_of_the_configuration_are_these(choice: str, settings: dict[str, Any]) -> None:
    assert made(compose([f"strategy={choice}"]).strategy) == DeepSpeedStrategy(**settings)


def refusal(settings: dict[str, Any], plan: dict[str, Any], installed: bool = True) -> str:
    """What starting says against it."""
    real = importlib.util.find_spec
    if not installed:
        importlib.util.find_spec = lambda name, package=None: None if name == "deepspeed" else real(name, package)
    strategy = DeepSpeedStrategy(**settings)
    try:
        strategy.connect(GlooBackend(timeout_s=30))
        strategy.setup(
            surprises.made(surprises.Normalised, Numbers.fp32),
            Weights(seed=0, fill=lambda module: None),
            surprises.optimizer,
            Plan(micro_batch=2, **plan),
        )
    except ConfigError as error:
        return str(error)
    finally:
        importlib.util.find_spec = real
        strategy.close()
    return ""


@pytest.mark.parametrize(
    ("settings", "plan", "complaint"),
    [
        ({"stage": 3, "hpz": True, "hpz_size": 3}, {}, "hpz_size=3 doesn't divide the 2 ranks of this run"),
        ({}, {"precision": Precision(numbers=Numbers.fp64)}, "computes in fp32 at most"),
        ({"stage": 3}, {"compile": True}, "Use compile=false"),
        ({"config": {"zero_optimisation": {}}}, {}, "zero_optimization"),
        ({"config": {"gradient_clipping": 0.5}}, {}, "gradient_clipping=0.5, ours is 0.0 (trainer.clip_norm=null)"),
        (
            {"bucket_mb": 8.0, "config": {"zero_optimization": {"reduce_bucket_size": 5}}},
            {},
            "zero_optimization.reduce_bucket_size=5, ours is 2097152",
        ),
        ({"config_path": "nowhere.json"}, {}, "nowhere.json can't be read"),
        (
            {"stage": 3, "config": {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "x"}}}},
            {},
            "offload_param.device=nvme, and offload_optimizer.device isn't nvme",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_on_all_ranks(
    workers: Workers, settings: dict[str, Any], plan: dict[str, Any], complaint: str
) -> None:
    heard = workers.run(refusal, 2, settings, plan, timeout=60)
    assert len(set(heard)) == 1
    assert complaint in heard[0]
    assert "\n" not in heard[0]


def test_machine_without_it_is_told_how_to_install_it(workers: Workers) -> None:
    heard = workers.run(refusal, 2, {}, {}, False, timeout=60)
    assert len(set(heard)) == 1
    assert "pip install 'shardwright[deepspeed]'" in heard[0]


def without_launcher() -> tuple[str, bool]:
    """Start as a bare `python` does; whether the environment is as before."""
    said = os.environ.pop("LOCAL_RANK")
    try:
        return refusal({"stage": 3}, {}), "LOCAL_RANK" not in os.environ
    finally:
        os.environ["LOCAL_RANK"] = said


def test_process_without_launcher_starts(workers: Workers) -> None:
    assert workers.run(without_launcher, 1, timeout=60) == [("", True)]


def from_files() -> dict[str, list[float] | str]:
    """Of each file of published shape, the losses of two steps; or what refuses it."""
    return {name: from_file(name) for name in CASES}


def from_file(name: str) -> list[float] | str:
    mine = CASES[name].fits or ours()
    file = FILES / f"{name}.json"
    if name == "infinity_nvme":  # the folder is of another machine
        config = json.loads(file.read_text().replace("/mnt/fast", tempfile.gettempdir()))
        strategy = DeepSpeedStrategy(stage=mine.stage, config=config)
    else:
        strategy = DeepSpeedStrategy(stage=mine.stage, config_path=str(file))
    adamw = AdamWOptimizer(lr=2e-4, beta1=0.9, beta2=0.97, eps=1e-7, weight_decay=0.05)
    losses = []
    try:
        world = strategy.connect(GlooBackend(timeout_s=30))
        model, optimizer = strategy.setup(
            surprises.made(surprises.Normalised, Numbers.fp32),
            Weights(seed=0, fill=lambda module: None),
            lambda named: adamw.make(list(named)),
            mine.plan,
        )
        for step in range(2):
            first = 24 * step + 6 * world.rank
            batches = [surprises.samples(at, at + 2) for at in range(first, first + 6, 2)]
            sums = strategy.forward_backward(model, batches, surprises.summed, 16.0)
            assert not bool(strategy.step(model, optimizer).skipped)
            losses += world.reduce([float(sums.loss) / 16.0])
    except ConfigError as error:
        return str(error)
    finally:
        strategy.close()
    return losses


def test_files_of_published_shape_train_or_are_refused_in_one_line(workers: Workers) -> None:
    refused = {
        "scheduler_inside": 'scheduler.type="WarmupDecayLR"',
        "zeropp": "zero_optimization.zero_quantized_weights=true",
    }
    answers = workers.run(from_files, SIZE, timeout=120)
    assert all(answer == answers[0] for answer in answers)
    for name, answer in answers[0].items():
        if name in refused:
            assert isinstance(answer, str), f"{name}: {answer}"
            assert refused[name] in answer
            assert "\n" not in answer
        else:
            assert isinstance(answer, list), f"{name}: {answer}"
            assert answer == pytest.approx([2.0, 2.0], abs=0.5), name  # six words, hardly trained


class Torchs(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=2)


class Own(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=2, offload_optimizer=Offload.cpu, cpu_adam=True)


def compiled() -> str:
    """What it takes before the tests, and after them costs nothing."""
    script = "import deepspeed, strategies._deepspeed as d; d.compile_cpu_adam()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, text=True, timeout=170,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    return done.stderr


def test_own_adam_is_compiled_once_and_never_waits_for_the_dead() -> None:
    compiled()
    (folder,) = (path.parent for path in operators().glob("*/*.so"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    (folder / "lock").touch()  # as a killed build leaves it
    assert "compiling" not in compiled()
    assert not (folder / "lock").exists()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.so")} == before


def test_own_adam_trains_as_torchs_and_each_goes_on_from_the_other(workers: Workers) -> None:
    job = Job(rule="adamw", lr=0.01, numbers="fp32", clip_norm=0.2, unused=True, steps=tuple(range(6)))
    first, rest = job.over(job.steps[:3]), job.over(job.steps[3:])
    torchs, own = (workers.run(jobs.train_job, 2, recipe, job, None)[0] for recipe in (Torchs, Own))
    check_numbers(own.losses, torchs.losses, absolute=5e-6, what="loss")
    for here, there in ((Torchs, Own), (Own, Torchs)):
        [start, *_] = workers.run(jobs.train_job, 2, here, first, None)
        [end, *_] = workers.run(jobs.train_job, 2, there, rest, start.snapshot)
        check_numbers(end.losses, torchs.losses[3:], absolute=5e-6, what="loss")
        check_tensors(end.snapshot.optim, torchs.snapshot.optim, 1e-4, "moment")


def differing() -> str:
    """Of a model of which one rank uses a parameter that the other doesn't, without being told."""
    try:
        surprises.trained(DeepSpeedStrategy, {"stage": 1}, surprises.Surprising)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_use_different_parameters_are_refused_on_all_ranks(workers: Workers) -> None:
    [heard, other] = workers.run(differing, 2, timeout=60)
    assert heard == other
    assert "strategy.find_unused=true" in heard
    assert ".gate" in heard


def collectives(spec: ModelSpec, **settings: Any) -> set[tuple[str, str, int, int, int]]:
    """Kind, phase, numbers, count and ranks of what 8 ranks on 2 machines send; the norm left out."""
    strategy, world = DeepSpeedStrategy(**settings), WorldSpec(size=8, local_size=4)
    found = strategy.footprint(spec, world, Plan(micro_batch=1, accumulation=3)).collectives
    return {
        (each.kind, each.phase, each.payload_bytes // 4, each.count, each.ranks)
        for each in found
        if each.payload_bytes > 8
    }


def test_footprint_names_the_collectives_of_a_step() -> None:
    spec = ModelSpec(num_parameters=1000, num_trainable=1000)
    updated = ("all_gather", "step", 1008, 1, 8)  # padded to pairs on each rank
    assert collectives(spec, stage=1) == {("all_reduce", "backward", 1000, 1, 8), updated}
    assert collectives(spec, stage=2) == {("all_reduce", "backward", 1000, 3, 8), updated}
    assert collectives(spec, stage=3) == {
        ("all_gather", "forward", 1000, 3, 8),
        ("reduce_scatter", "backward", 1000, 3, 8),
    }


def test_footprint_of_stage_3_tells_what_stays_gathered_and_hpz_what_stays_on_a_machine() -> None:
    with torch.device("meta"):
        spec = ModelSpec.of(nn.Sequential(nn.Linear(8, 8), *(nn.Linear(30_000, 10_000, bias=False) for _ in range(3))))
    large, reduced = 30_000 * 10_000, {("reduce_scatter", "backward", 72, 3, 8)}
    reduced |= {("reduce_scatter", "backward", large, 9, 8)}
    persistent = {("all_gather", "step", 64, 1, 8), ("all_gather", "step", 8, 1, 8)}
    # Of three times 3e8 numbers backward finds what is used within 1e9: 2 * 6e8 is further away.
    forward, again = ("all_gather", "forward", large, 9, 8), ("all_gather", "backward", large, 3, 8)
    assert collectives(spec, stage=3) == reduced | persistent | {forward, again}
    first, near = ("all_gather", "forward", large, 3, 8), ("all_gather", "forward", large, 6, 4)
    assert collectives(spec, stage=3, hpz=True) == reduced | persistent | {first, near, (*again[:4], 4)}


class Hearing(TorchDispatchMode):
    """Calls and bytes of each operator that sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name, whole = function._opname, args[1 if "reduce_scatter" in function._opname else 0]
            size = sum(value.nbytes for value in tree_leaves(whole))
            if (name, size) != ("allreduce_", 16):  # the ranks' agreement on what was used, on their control group
                count, total = self.sent.get(name, (0, 0))
                self.sent[name] = (count + 1, total + size)
        return function(*args, **(kwargs or {}))


def heard_and_predicted(settings: dict[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Calls and bytes of a later step, by operator."""
    strategy, model = DeepSpeedStrategy(**settings), Uneven(21, (50, 31, 71))
    world, plan = strategy.connect(GlooBackend(timeout_s=60)), Plan(micro_batch=1, accumulation=2)
    spec = ModelSpec.of(model)
    wrapped, optimizer = strategy.setup(model, Weights(seed=0, fill=lambda module: None), adamw, plan)
    for _ in range(3):
        with Hearing() as hearing:
            step(strategy, wrapped, plan)
            strategy.step(wrapped, optimizer)
    found: dict[str, tuple[int, int]] = {}
    for each in strategy.footprint(spec, WorldSpec(size=world.size, local_size=world.local_size), plan).collectives:
        name = {
            "all_reduce": "allreduce_",
            "all_gather": "_allgather_base_",
            "reduce_scatter": "_reduce_scatter_base_",
        }[each.kind]
        count, total = found.get(name, (0, 0))
        found[name] = (count + each.count, total + each.count * each.payload_bytes)
    strategy.close()
    return hearing.sent, found


@pytest.mark.parametrize(
    "settings",
    [{"stage": 1}, {"stage": 2}, {"stage": 2, "find_unused": True},
     {"stage": 3, "persist_numbers": 100, "prefetch_mb": 0.01}],
)  # fmt: skip
def test_footprint_sends_as_many_calls_and_bytes_as_a_step_does(workers: Workers, settings: dict[str, Any]) -> None:
    for heard, predicted in workers.run(heard_and_predicted, 2, {"bucket_mb": 0.01, **settings}):
        assert heard == predicted


@pytest.mark.parametrize(("stage", "kept"), [(1, 4 + 0.5 + 0.5 + 1), (2, 4 + 0.5 + 0.5 + 1), (3, 0.5 + 0.5 + 0.5 + 1)])
def test_footprint_counts_what_each_stage_cuts(stage: int, kept: float) -> None:
    spec = ModelSpec(num_parameters=800, num_trainable=800)
    found = DeepSpeedStrategy(stage=stage).footprint(spec, WorldSpec(size=8, local_size=8), Plan(micro_batch=1))
    assert found.weights_bytes + found.gradients_bytes + found.moments_bytes == kept * 800


def forgotten() -> bool:
    """Connect again after a run that broke off before `close`, as after an error in a notebook."""
    unclosed = DeepSpeedStrategy()
    unclosed.connect(GlooBackend(timeout_s=30))
    plan, none = Plan(micro_batch=2), Weights(seed=0, fill=lambda module: None)
    for strategy in (unclosed, DeepSpeedStrategy()):
        if strategy is not unclosed:
            torch.distributed.destroy_process_group()
            strategy.connect(GlooBackend(timeout_s=30))
        strategy.setup(surprises.made(surprises.Normalised, Numbers.fp32), none, surprises.optimizer, plan)
    strategy.close()
    return True


def test_run_after_one_that_never_closed_has_groups_of_its_own(workers: Workers) -> None:
    assert workers.run(forgotten, 2, timeout=60) == [True, True]
