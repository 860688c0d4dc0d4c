"""What every strategy must pass, and the worker processes that it takes.

An outside package tests its strategy with one class in a test module of its own:

    from strategies.testing import StrategyContract, workers

    class TestMine(StrategyContract):
        sizes = (1, 2)

        def make(self, *, unused=False):
            return MyStrategy()

`workers` is a session-wide fixture; `workers.run(function, size, *arguments)` calls a top-level
function on that many ranks and returns what each gave. All tests with several processes use it.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from strategies import _testing_jobs as jobs
from strategies._testing_jobs import Record, Snapshot
from strategies._testing_model import GLOBAL_BATCH, Job, Recipe
from strategies._testing_pool import JobError, Outcome, Workers
from strategies.base import ModelSpec, WorldSpec

__all__ = ["Job", "JobError", "Outcome", "Recipe", "Record", "StrategyContract", "Workers", "workers"]


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """The run's pool of worker processes."""
    pool = Workers()
    yield pool
    pool.close()


# Plain SGD first: it shows a wrong scale of the gradient, which Adam and clipping hide.
RULES = {
    "sgd": Job(rule="sgd", lr=0.5),
    "sgd_clipped": Job(rule="sgd", lr=0.5, clip_norm=0.2),
    "adamw": Job(rule="adamw", lr=5e-4, clip_norm=0.2),
}
_TWENTY = tuple(range(20))


class StrategyContract(Recipe, ABC):
    """The tests; a subclass says how the strategy is made, and on how many ranks it runs.

    Everything is held against plain torch in one process. Tests of meaning compute in `exact`
    numbers, in which only a mistake can make a difference that shows.
    """

    sizes: ClassVar[tuple[int, ...]] = (1, 2)
    """World sizes to run on."""
    refused_sizes: ClassVar[tuple[int, ...]] = ()
    """World sizes that `connect` must refuse."""
    accumulations: ClassVar[tuple[int, ...]] = (1, 2)
    """Micro-batches per step to try; size times accumulation must divide 24."""
    exact: ClassVar[str] = "fp64"
    """`fp64`, or `fp32` for a strategy that knows no fp64."""
    lower: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    """Lower precisions that it knows."""
    forward_is_collective: ClassVar[bool] = False
    """A forward pass needs the other ranks (sharded weights)."""
    loss_tolerance: ClassVar[dict[str, float]] = {"fp64": 1e-7, "fp32": 5e-6}
    """Largest difference of a loss from one process, over 20 steps."""
    norm_tolerance: ClassVar[dict[str, float]] = {"fp64": 1e-5, "fp32": 1e-4}
    """Largest relative difference of a gradient norm."""
    weight_tolerance: ClassVar[dict[str, float]] = {"fp64": 1e-9, "fp32": 1e-4}
    """Largest relative difference of a weight or moment, as a norm over the tensor."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every size, accumulation, rule... that it names."""
        main = self.main_size()
        choices: dict[str, tuple[Any, ...]] = {
            "size": self.sizes,
            "small_size": tuple(size for size in self.sizes if size <= 2) or (main,),
            "refused_size": self.refused_sizes,
            "accumulation": self.accumulations,
            "rule": tuple(RULES),
            "lower_precision": self.lower,
            "move": tuple((main, other) for other in self.sizes if other != main)
            + tuple((other, main) for other in self.sizes if other != main),
        }
        for name, values in choices.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    @classmethod
    def main_size(cls) -> int:
        """The size for tests that need only one: 2 where it may be."""
        return 2 if 2 in cls.sizes else max(cls.sizes)

    # The same training, however it is spread.

    def test_training_equals_one_process(self, workers: Workers, size: int, accumulation: int, rule: str) -> None:
        job = replace(RULES[rule], numbers=self.exact, steps=_TWENTY)
        self.check_against_reference(workers, size, replace(job, accumulation=accumulation))

    def test_fp32_losses_equal_one_process(self, workers: Workers, size: int, accumulation: int) -> None:
        if self.exact == "fp32":
            pytest.skip("a rule of test_training_equals_one_process")
        job = replace(RULES["adamw"], numbers="fp32", steps=_TWENTY, accumulation=accumulation)
        record, wanted = self.train(workers, size, job), self.reference(workers, job)
        check_numbers(record.losses, wanted.losses, absolute=self.loss_tolerance["fp32"], what="loss")

    def test_fp32_first_gradients_equal_one_process(self, workers: Workers, size: int, accumulation: int) -> None:
        # Gradients don't cross the seam. A step this long leaves nothing but the gradient in the weights.
        job = Job(rule="sgd", lr=2.0**14, numbers="fp32", steps=(0,), accumulation=accumulation)
        record, wanted = self.train(workers, size, job), self.reference(workers, job)
        check_tensors(record.full, wanted.full, 1e-5, "gradient")

    def test_auxiliary_terms_are_averaged(self, workers: Workers, size: int, accumulation: int) -> None:
        self.check_against_reference(workers, size, Job(numbers=self.exact, auxiliary=True, accumulation=accumulation))

    def test_meta_model_is_filled_and_tied(self, workers: Workers) -> None:
        self.check_against_reference(workers, self.main_size(), Job(numbers=self.exact, on_meta=True))

    def test_fused_optimizer_equals_one_process(self, workers: Workers) -> None:
        self.check_against_reference(
            workers, self.main_size(), Job(rule="adamw_fused", lr=0.01, numbers=self.exact, accumulation=2)
        )

    def test_unused_parameter_is_left_alone(self, workers: Workers, size: int, accumulation: int) -> None:
        job = Job(rule="adamw", lr=0.01, numbers=self.exact, unused=True, accumulation=accumulation)
        record = self.check_against_reference(workers, size, job)
        assert torch.equal(record.full["spare"], torch.full_like(record.full["spare"], 0.5)), "spare was touched"
        for name, value in record.snapshot.optim.items():
            if name.startswith("spare/"):
                assert not value.any(), f"{name} of a parameter that was never used is {value}"

    def test_evaluation_changes_nothing_and_averages_over_counted_positions(self, workers: Workers, size: int) -> None:
        job = Job(numbers=self.exact, evaluate_between=True, accumulation=2)
        record = self.check_against_reference(workers, size, job)
        before_last = replace(job, evaluate_between=False)
        for end in (1, len(job.steps)):
            full = self.reference(workers, before_last.over(job.steps[:end])).full
            wanted = jobs.reference_evaluation(full, job.steps[end - 1] + 100, record.data_size)
            check_numbers([record.evaluations[end - 1]], [wanted], absolute=2e-6, what="evaluated loss")

    def test_prediction_equals_the_bare_model(self, workers: Workers, size: int) -> None:
        job = Job(numbers=self.exact, steps=(0, 1), accumulation=2)
        answers = workers.run(jobs.predict_job, size, type(self), job)
        parts = {rank: torch.cat(outputs) for rank, outputs, _ in answers}
        together = torch.cat([parts[rank] for rank in sorted(parts)])
        wanted = workers.run(jobs.reference_predictions, 1, job)[0]
        check_tensors({"outputs": together}, {"outputs": wanted}, self.weight_tolerance[self.exact], "prediction")
        assert not any(graph for _, _, graph in answers), "a prediction carries a graph"

    # State.

    def test_resume_continues_the_same(self, workers: Workers, size: int) -> None:
        self.check_resume(workers, size, size, Job(rule="adamw", lr=0.01, numbers=self.exact))

    def test_resume_with_momentum_continues_the_same(self, workers: Workers) -> None:
        self.check_resume(workers, self.main_size(), self.main_size(), Job(rule="momentum", numbers=self.exact))

    def test_resume_at_another_size_goes_on(self, workers: Workers, move: tuple[int, int]) -> None:
        self.check_resume(workers, *move, Job(rule="adamw", lr=0.01, numbers=self.exact, unused=True))

    def test_state_before_the_first_step_is_whole(self, workers: Workers, size: int) -> None:
        job = Job(rule="adamw", lr=0.01, numbers=self.exact, unused=True)
        fresh = workers.run(jobs.fresh_job, size, type(self), job)[0]
        wanted = self.reference(workers, job)
        start = self.reference(workers, job.over(()))
        assert fresh.weights_kept, "making a template changed the state"
        check_tensors(fresh.state.weights, start.snapshot.weights, 0.0, "weight before the first step")
        moments = {name: torch.zeros_like(value) for name, value in wanted.snapshot.optim.items()}
        check_tensors(fresh.state.optim, moments, 0.0, "moment before the first step")
        described = {
            name: (tuple(value.shape), str(value.dtype))
            for name, value in {**wanted.snapshot.weights, **wanted.snapshot.optim}.items()
        }
        assert fresh.template == described, f"template {fresh.template}, state {described}"
        self.check_record(fresh.after, wanted)

    def test_state_has_the_bare_models_names(self, workers: Workers, size: int) -> None:
        job = Job(rule="adamw", lr=0.01, numbers=self.exact, unused=True)
        records, wanted = self.train_all(workers, size, job), self.reference(workers, job)
        assert records[0].full.keys() == wanted.full.keys(), _differing("full_state_dict", records[0].full, wanted.full)
        for rank, record in enumerate(records[1:], 1):
            assert not record.full, f"full_state_dict on rank {rank} holds {sorted(record.full)}"
        snapshot = records[0].snapshot
        assert snapshot.aliases == wanted.snapshot.aliases, f"aliases {snapshot.aliases}"
        check_tensors(records[0].full, wanted.full, self.weight_tolerance[self.exact], "weight")
        for name, value in snapshot.weights.items():
            assert torch.equal(value, records[0].full[name]), f"{name} in state and full_state_dict differ"

    def test_full_state_dict_stays_as_it_was(self, workers: Workers) -> None:
        job = Job(numbers=self.exact)
        assert workers.run(jobs.snapshot_is_a_copy_job, self.main_size(), type(self), job)[0], (
            "full_state_dict changed while training went on"
        )

    @pytest.mark.parametrize("problem", ["missing", "unknown", "moment", "shape"])
    def test_foreign_state_is_refused_on_all_ranks(self, workers: Workers, problem: str) -> None:
        job = Job(rule="momentum", numbers=self.exact)
        heard = workers.run(jobs.refused_state_job, self.main_size(), type(self), job, problem)
        check_refusals(heard)

    # Where the time goes.

    def test_communication_is_measured(self, workers: Workers, small_size: int) -> None:
        size, late_s, job = small_size, 0.5, Job(numbers=self.exact, accumulation=2, steps=(0, 1, 2))
        ranks = workers.run(jobs.communication_job, size, type(self), job, late_s)
        for rank, steps in enumerate(ranks):
            for exposed, whole, took in steps:
                assert exposed is not None, f"rank {rank} doesn't know its exposed communication"
                assert whole is not None, f"rank {rank} doesn't know its communication"
                assert 0 <= exposed <= whole <= took, f"rank {rank}: {exposed} s of {whole} s in a step of {took} s"
                assert size > 1 or whole == 0, f"alone, {whole} s of communication"
        if size > 1:
            waited, late = ranks[0][-1][0], ranks[-1][-1][0]
            assert waited > 0.8 * late_s, f"rank 0 waited {late_s} s for another, and reports {waited} s"
            assert waited - late > 0.4 * late_s, f"rank 0 waited {waited} s for one that waited {late} s itself"

    # What goes wrong.

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused"])
    def test_non_finite_step_changes_nothing(self, workers: Workers, optimizer: str) -> None:
        job = Job(rule=optimizer, lr=0.01, numbers=self.exact, poisoned=(1, 3), accumulation=2, clip_norm=0.2)
        answers = workers.run(jobs.poisoned_job, self.main_size(), type(self), job)
        wanted = [step in job.poisoned for step in job.steps]
        for rank, (record, unchanged) in enumerate(answers):
            assert record.skipped == wanted, f"rank {rank} reports skipped={record.skipped}, not {wanted}"
            assert unchanged, f"rank {rank}: a non-finite step changed the state"
            finite = [math.isfinite(norm) for norm in record.norms]
            assert finite == [not each for each in wanted], f"rank {rank} reports norms {record.norms}"
        record, reference = answers[0][0], self.reference(workers, job)
        check_tensors(record.full, reference.full, self.weight_tolerance[self.exact], "weight after skipped steps")

    def test_missing_device_is_refused_on_all_ranks(self, workers: Workers, size: int) -> None:
        for lame in {0, size - 1}:
            answers = workers.run(jobs.missing_device_job, size, type(self), lame, timeout=60.0)
            check_refusals([heard for heard, _ in answers])
            assert not any(started for _, started in answers), "communication started before all were heard"

    def test_impossible_precision_is_refused_on_all_ranks(self, workers: Workers, size: int) -> None:
        if torch.cuda.is_available():
            pytest.skip("tf32 is only impossible without a GPU")
        check_refusals(workers.run(jobs.refused_plan_job, size, type(self), timeout=60.0))

    def test_wrong_number_of_ranks_is_refused_on_all_ranks(self, workers: Workers, refused_size: int) -> None:
        answers = workers.run(jobs.refused_size_job, refused_size, type(self), timeout=60.0)
        check_refusals([heard for heard, _ in answers])
        assert not any(started for _, started in answers), "communication started before the refusal"

    # Micro-batches, precision, connections.

    def test_fewer_micro_batches_than_planned_reduce_nothing(self, workers: Workers, size: int) -> None:
        job = Job(numbers=self.exact, accumulation=2)
        records = workers.run(jobs.try_out_job, size, type(self), job, self.forward_is_collective, timeout=60.0)
        self.check_record(records[0], self.reference(workers, job))

    def test_lower_precision_stays_near(self, workers: Workers, lower_precision: str) -> None:
        job = Job(rule="sgd", lr=0.2, numbers="fp32", accumulation=2)
        lower = replace(job, numbers=lower_precision, loss_scale=1024.0 if lower_precision == "fp16" else 65536.0)
        low = self.train(workers, self.main_size(), lower)
        wanted = self.reference(workers, job)
        assert not any(low.skipped), f"{lower_precision} skipped steps: {low.skipped}"
        check_numbers(low.losses, wanted.losses, absolute=0.03, what=f"{lower_precision} loss")
        plain = self.train(workers, self.main_size(), job)
        assert low.losses != plain.losses, f"{lower_precision} computes exactly as fp32: it isn't in force"
        check_tensors(low.full, wanted.full, 0.03, f"{lower_precision} weight")
        for name, value in low.snapshot.weights.items():
            assert value.dtype is torch.float32, f"master weight {name} is {value.dtype}"

    def test_loss_scale_survives_a_resume(self, workers: Workers) -> None:
        if "fp16" not in self.lower:
            pytest.skip("no fp16")
        job = Job(rule="sgd", lr=0.1, numbers="fp16", loss_scale=1024.0, growth_interval=2, steps=(0, 1, 2))
        first = self.train(workers, self.main_size(), job).snapshot
        assert first.scaler.get("scale") == 2048.0, f"scaler after 3 steps at growth_interval=2: {first.scaler}"
        going_on = job.over((3,))
        second = self.train(workers, self.main_size(), going_on, first).snapshot
        assert second.scaler.get("scale") == 4096.0, f"scaler after 4 steps and a resume: {second.scaler}"

    def test_nothing_is_left_after_close(self, workers: Workers, size: int) -> None:
        job = Job(numbers=self.exact)
        answers = workers.run(jobs.connect_again_job, size, type(self), job, timeout=60.0)
        assert not any(left for left, _ in answers), f"left after close: {[left for left, _ in answers]}"
        self.check_record(answers[0][1], self.reference(workers, job))

    def test_set_up_again_on_the_same_connection(self, workers: Workers) -> None:
        first, second = Job(numbers=self.exact), Job(rule="adamw", lr=0.01, numbers=self.exact, accumulation=2)
        one, two = workers.run(jobs.set_up_twice_job, self.main_size(), type(self), first, second)[0]
        wanted = self.reference(workers, first)
        check_numbers(one.losses, wanted.losses, absolute=self.loss_tolerance[self.exact], what="first loss")
        self.check_record(two, self.reference(workers, second))

    def test_footprint_counts_every_kind(self) -> None:
        job = Job(numbers="fp32")
        model = ModelSpec(num_parameters=1000, num_trainable=900, activation_bytes_per_sample=50)
        for size in self.sizes:
            footprint = self.make().footprint(model, WorldSpec(size=size, local_size=size), job.plan(size))
            parts = (footprint.weights_bytes, footprint.gradients_bytes, footprint.moments_bytes)
            assert all(part > 0 for part in parts), f"{footprint} at size {size}"
            assert footprint.total_bytes >= sum(parts) + footprint.activations_bytes, f"{footprint} at size {size}"

    # How they compare.

    def train_all(self, workers: Workers, size: int, job: Job, start: Snapshot | None = None) -> list[Record]:
        """Every rank's record; all ranks must have seen the same."""
        records: list[Record] = workers.run(jobs.train_job, size, type(self), job, start)
        for rank, record in enumerate(records):
            for what in ("losses", "norms", "skipped", "evaluations", "digest"):
                mine, theirs = getattr(record, what), getattr(records[0], what)
                same = mine == theirs or (what == "norms" and any(map(math.isnan, mine)))
                assert same, f"{what} of ranks {rank} and 0 differ: {mine} and {theirs}"
        return records

    def train(self, workers: Workers, size: int, job: Job, start: Snapshot | None = None) -> Record:
        """Rank 0's record."""
        return self.train_all(workers, size, job, start)[0]

    def reference(self, workers: Workers, job: Job) -> Record:
        """What plain torch gives in one process: computed once per run of the tests."""
        key = replace(job, accumulation=1, on_meta=False, evaluate_between=False)
        if key not in workers.remembered:
            workers.remembered[key] = workers.run(jobs.reference_job, 1, key)[0]
        record: Record = workers.remembered[key]
        return record

    def check_against_reference(self, workers: Workers, size: int, job: Job) -> Record:
        """Train, and compare everything."""
        if GLOBAL_BATCH % (size * job.accumulation):
            pytest.skip(f"{GLOBAL_BATCH} samples can't be split {size} x {job.accumulation} ways")
        record = self.train(workers, size, job)
        self.check_record(record, self.reference(workers, job))
        return record

    def check_record(self, record: Record, wanted: Record) -> None:
        """Losses, norms, weights and moments."""
        numbers = self.exact
        check_numbers(record.losses, wanted.losses, absolute=self.loss_tolerance[numbers], what="loss")
        check_numbers(record.norms, wanted.norms, relative=self.norm_tolerance[numbers], what="gradient norm")
        assert not any(record.skipped), f"steps were skipped: {record.skipped}"
        check_tensors(record.full, wanted.full, self.weight_tolerance[numbers], "weight")
        mine, theirs = record.snapshot, wanted.snapshot
        check_tensors(mine.weights, theirs.weights, self.weight_tolerance[numbers], "stored weight")
        check_tensors(mine.optim, theirs.optim, 10 * self.weight_tolerance[numbers], "moment")

    def check_resume(self, workers: Workers, size: int, other: int, job: Job) -> None:
        """Three steps at `size`, the rest at `other`, against all of them at once in one process."""
        first = self.train(workers, size, job.over(job.steps[:3]))
        second = self.train(workers, other, job.over(job.steps[3:]), first.snapshot)
        wanted = self.reference(workers, job)
        check_numbers(first.losses, wanted.losses[:3], absolute=self.loss_tolerance[self.exact], what="loss")
        rest = _later(wanted, 3)
        self.check_record(second, rest)


def _later(record: Record, start: int) -> Record:
    """The same record without its first steps."""
    return replace(record, losses=record.losses[start:], norms=record.norms[start:], skipped=record.skipped[start:])


def check_numbers(
    actual: list[float], wanted: list[float], *, what: str, absolute: float = 0.0, relative: float = 0.0
) -> None:
    """Fail unless each number is within `absolute + relative * |wanted|`."""
    assert len(actual) == len(wanted), f"{len(actual)} values of {what}, not {len(wanted)}"
    for step, (mine, theirs) in enumerate(zip(actual, wanted, strict=True)):
        allowed = absolute + relative * abs(theirs)
        assert abs(mine - theirs) <= allowed, (
            f"{what} of step {step} is {mine:.12g}, one process gives {theirs:.12g}: "
            f"{abs(mine - theirs):.3g} apart, {allowed:.3g} allowed"
        )


def check_tensors(actual: dict[str, Tensor], wanted: dict[str, Tensor], relative: float, what: str) -> None:
    """Fail unless the names are equal and each tensor is within `relative` of its L2 norm."""
    assert actual.keys() == wanted.keys(), _differing(what, actual, wanted)
    for name, theirs in wanted.items():
        mine = actual[name]
        assert mine.shape == theirs.shape, f"{what} {name} has shape {tuple(mine.shape)}, not {tuple(theirs.shape)}"
        distance = float((mine.double() - theirs.double()).norm())
        allowed = relative * float(theirs.double().norm())
        assert distance <= allowed, f"{what} {name} is {distance:.3g} from one process, {allowed:.3g} allowed"


def check_refusals(heard: list[str]) -> None:
    """Fail unless every rank heard one and the same message, of one line."""
    assert all(heard), f"not every rank refused: {heard}"
    assert len(set(heard)) == 1, f"the ranks heard different things: {heard}"
    assert "\n" not in heard[0], f"more than one line: {heard[0]!r}"


def _differing(what: str, actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    return (
        f"{what}: names differ; missing {sorted(wanted.keys() - actual.keys())}, "
        f"not the bare model's {sorted(actual.keys() - wanted.keys())}"
    )
