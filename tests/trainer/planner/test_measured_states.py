"""What each strategy predicts of a model's states, held against what its ranks really hold."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.testing import Workers
from tests.trainer.planner.measured_states import CHOICES, ELASTIC, SIZES, States, chosen, states_of, why_not

WITHIN = 0.02


def check(states: States, predicted: Any) -> None:
    for kind in ("weights", "gradients", "moments", "nvme"):
        wanted = getattr(states, kind)
        assert getattr(predicted, f"{kind}_bytes") == pytest.approx(wanted, rel=WITHIN), kind
    assert predicted.host_bytes + predicted.nvme_bytes <= predicted.total_bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "choice", [pytest.param(name, marks=pytest.mark.horovod if name == "horovod" else ()) for name in CHOICES]
)
def test_states_of_each_strategy_take_what_is_predicted(workers: Workers, choice: str, size: int) -> None:
    if reason := why_not(choice, size):
        pytest.skip(f"{choice} {reason}")
    check(*states_of(workers, chosen()[choice], size))


def test_every_choice_but_the_elastic_one_is_made() -> None:
    assert {*CHOICES} - {*chosen()} <= {ELASTIC}


@pytest.mark.parametrize(
    ("settings", "accumulation"),
    [
        ({"stage": 1}, 2),
        ({"stage": 2}, 2),
        ({"stage": 2, "find_unused": True}, 1),
        ({"stage": 3, "find_unused": True}, 2),
        ({"stage": 2, "offload_optimizer": "cpu"}, 1),
        ({"stage": 3, "offload_optimizer": "cpu"}, 1),
    ],
)
def test_gradients_of_zero_take_what_is_predicted_where_they_wait(
    workers: Workers, settings: dict[str, Any], accumulation: int
) -> None:
    pytest.importorskip("deepspeed")
    from strategies.deepspeed import DeepSpeedStrategy, Offload

    offload = Offload[settings.get("offload_optimizer", "none")]
    strategy = DeepSpeedStrategy(**{**settings, "offload_optimizer": offload})
    check(*states_of(workers, strategy, 2, accumulation))


def test_second_copy_of_hpz_is_there_until_the_step(workers: Workers) -> None:
    pytest.importorskip("deepspeed")
    (states, predicted), (_, plain) = (states_of(workers, chosen()[name], 4) for name in ("zero_hpz", "zero3"))
    second = states.weights_before_step - states.weights
    assert predicted.buffers_bytes - plain.buffers_bytes == pytest.approx(second, rel=WITHIN)
    assert second > 0
