"""SageMaker's library as a backend: its rules, and training over a stand-in that registers itself under its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from strategies import ec2
from strategies.backends import Backend, GlooBackend
from strategies.base import Strategy
from strategies.ddp import DDPStrategy
from strategies.deepspeed import DeepSpeedStrategy
from strategies.errors import ConfigError
from strategies.fsdp import FSDPStrategy, Sharding
from strategies.smddp import SMDDPBackend
from strategies.testing import Job, StrategyContract, Workers
from strategies.world import Launch
from tests.starts import start
from tests.trainer.jobs import ROWS, losses

STANDINS = Path(__file__).parent / "standins"
NAME = "smdistributed.dataparallel.torch.torch_smddp"


class OverStandIn(StrategyContract):
    """Some of the contract: the strategies' own tests hold all of it."""

    __test__ = False

    def backend(self) -> Backend:
        os.environ["SM_CURRENT_INSTANCE_TYPE"] = "ml.p4d.24xlarge"
        sys.path.insert(0, str(STANDINS))
        return SMDDPBackend(timeout_s=60.0, scratch_bytes=1 << 24)


class DDPOver(OverStandIn):
    def make(self, *, unused: bool = False) -> Strategy:
        return DDPStrategy(find_unused=unused)


class FSDPOver(OverStandIn):
    forward_is_collective = True

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(wrap=["Linear"])


class HybridOver(OverStandIn):
    forward_is_collective = True

    def make(self, *, unused: bool = False) -> Strategy:
        return FSDPStrategy(sharding=Sharding.hybrid, replicas=2)


class ZeroOver(OverStandIn):
    exact = "fp32"
    forward_is_collective = True

    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3, persist_numbers=0)


def what_talks() -> tuple[str, str, str | None]:
    recipe = DDPOver()
    strategy = recipe.make()
    world = strategy.connect(recipe.backend())
    assert world.control is not None
    named = dist.get_backend(), dist.get_backend(world.control), os.environ.get("SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES")
    strategy.close()
    return named


@pytest.mark.parametrize(("recipe", "size"), [(DDPOver, 2), (FSDPOver, 2), (HybridOver, 4), (ZeroOver, 2)])
def test_training_over_it_equals_one_process(workers: Workers, recipe: type[OverStandIn], size: int) -> None:
    if recipe is ZeroOver:
        pytest.importorskip("deepspeed")
    job = Job(rule="adamw", lr=0.01, clip_norm=0.2, accumulation=2, evaluate_between=True, numbers=recipe.exact)
    recipe().check_against_reference(workers, size, job)


def test_a_run_over_it_goes_on_elsewhere(workers: Workers) -> None:
    job = Job(rule="adamw", lr=0.01)
    contract = FSDPOver()
    first = contract.train(workers, 2, job.over(job.steps[:3]))
    rest = DDPOver().train(workers, 2, job.over(job.steps[3:]), first.snapshot)
    assert rest.losses == pytest.approx(contract.reference(workers, job).losses[3:], abs=1e-7)


def test_gradients_go_over_it_and_messages_over_gloo(workers: Workers) -> None:
    assert workers.run(what_talks, 2) == [("smddp", "gloo", str(1 << 24))] * 2


def test_a_run_takes_it_by_name(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.p4de.24xlarge")
    monkeypatch.syspath_prepend(str(STANDINS))
    for name in ("gloo", "smddp"):
        words = [*ROWS, f"backend={name}", f"run.dir={tmp_path / name}"]
        for found in workers.run(start, 2, words, (), "Rows"):
            assert found.code == 0, found.err
    assert losses(tmp_path / "smddp") == losses(tmp_path / "gloo")


# Rules.


def refusal(monkeypatch: pytest.MonkeyPatch, kind: str | None = None, **variables: str) -> str:
    """What is said on a machine of that kind."""
    monkeypatch.setattr(ec2, "instance_type", lambda: kind)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        SMDDPBackend().device(Launch())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_library_its_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAME, None)
    for kind in (None, "p4d.24xlarge"):
        said = refusal(monkeypatch, kind)
        assert all(part in said for part in ("torch 2.4.1", "Python 3.11", "CUDA 12.1", torch.__version__))
        assert said.endswith("(backend).")


def test_other_machines_are_refused_before_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "p5.48xlarge")
    assert "p4d.24xlarge and p4de.24xlarge, and this is p5.48xlarge" in said
    assert "torch 2.4.1" in said


def test_an_import_that_fails_in_its_own_way_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smdistributed" / "dataparallel" / "torch"
    folder.mkdir(parents=True)
    (folder / "torch_smddp.py").write_text("raise RuntimeError('not on this instance\\nfor several reasons')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "smdistributed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "can't be imported: not on this instance. The newest" in refusal(monkeypatch)


def test_its_own_launcher_allows_no_groups_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "p4d.24xlarge", SMDATAPARALLEL_USE_HOMOGENEOUS="1")
    assert "SMDATAPARALLEL_USE_HOMOGENEOUS" in said
    assert "torchrun" in said
    monkeypatch.setitem(sys.modules, NAME, None)
    assert "can't be imported" in refusal(monkeypatch, "p4d.24xlarge", SMDATAPARALLEL_OPTIMIZE_SDP="true")


@pytest.mark.parametrize("key", ["scratch_bytes", "sort_bytes"])
@pytest.mark.parametrize("size", [0, -8192, 8191, 12288])
def test_buffers_are_multiples_of_8192(key: str, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"{key}={size} is not a multiple of 8192.*backend\.{key}"):
        SMDDPBackend(**{key: size})  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "says"), [("16MiB", "=16MiB is not a multiple"), ("8192", "=16384, and the env")])
def test_a_buffer_that_the_environment_sets_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    monkeypatch.setattr(ec2, "instance_type", lambda: None)
    monkeypatch.setenv("SMDDP_AG_SORT_BUFFER_SIZE_BYTES", value)
    with pytest.raises(ConfigError, match=f"sort_bytes{says}"):
        SMDDPBackend(sort_bytes=16384).device(Launch())


def test_the_machine_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.g5.xlarge")
    assert ec2.instance_type() == "g5.xlarge"


def test_compiling_is_refused_by_it_alone(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compile=true can't go with backend=smddp.*\(compile, backend\)"):
        SMDDPBackend().refuse_compiling()
    GlooBackend().refuse_compiling()
    words = [*ROWS, "compile=true", "backend=smddp", f"run.dir={tmp_path}"]
    for rank, found in enumerate(workers.run(start, 2, words, (), "Rows")):
        assert found.code == 2
        assert ("compile=true can't go with" in found.err) is (rank == 0), found.err
