from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from strategies.errors import ConfigError
from trainer.ema import WeightAverage


def weights() -> dict[str, Tensor]:
    return {"a": torch.ones(3), "b": torch.full((2, 2), 2.0, dtype=torch.float64), "count": torch.tensor(1)}


def test_update_follows_the_recursion_and_copies_counters() -> None:
    average, live = WeightAverage(0.75), weights()
    average.update(live)
    live["a"].mul_(5)
    live["b"].zero_()
    live["count"].fill_(7)
    average.update(live)
    assert average.tensors()["a"].tolist() == [2.0, 2.0, 2.0]  # 0.75 * 1 + 0.25 * 5
    assert average.tensors()["b"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert average.tensors()["count"].item() == 7


def test_update_leaves_the_live_weights_alone() -> None:
    average, live = WeightAverage(0.5), weights()
    average.update(live)
    average.update(live)
    assert live["a"].tolist() == [1.0, 1.0, 1.0]
    assert average.tensors()["a"] is not live["a"]


def test_update_with_low_precision_weights_averages_in_fp32() -> None:
    average, live = WeightAverage(0.999), {"a": torch.ones(1, dtype=torch.bfloat16)}
    average.update(live)
    average.update({"a": torch.full((1,), 2.0, dtype=torch.bfloat16)})
    assert average.tensors()["a"].dtype is torch.float32
    assert average.tensors()["a"].item() == pytest.approx(1.001)


def writes_into(live: dict[str, torch.Tensor]) -> Callable[[Mapping[str, torch.Tensor]], None]:
    def compute_with(weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            live[name].copy_(value)

    return compute_with


def test_swapped_shows_the_average_and_puts_back_every_bit() -> None:
    average, live = WeightAverage(0.5), weights()
    average.update(live)
    live["a"].copy_(torch.tensor([0.1, float("nan"), 3e-41]))
    before = live["a"].clone()
    with average.swapped(live, writes_into(live)):
        assert live["a"].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(live["a"].view(torch.int32), before.view(torch.int32))
    assert average.tensors()["a"].tolist() == [1.0, 1.0, 1.0]


def test_swapped_puts_back_after_an_error() -> None:
    average, live = WeightAverage(0.5), weights()
    average.update(live)
    live["a"].zero_()
    with pytest.raises(RuntimeError, match="stop"), average.swapped(live, writes_into(live)):
        raise RuntimeError("stop")
    assert live["a"].tolist() == [0.0, 0.0, 0.0]


def test_load_of_tensors_goes_on_as_if_never_stopped() -> None:
    one, live = WeightAverage(0.9), weights()
    one.update(live)
    two = WeightAverage(0.9)
    two.load(one.tensors())
    live["a"].mul_(3)
    one.update(live)
    two.update(live)
    assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    assert two.tensors()["a"] is not one.tensors()["a"]


def test_tensors_before_the_first_update_are_none() -> None:
    assert WeightAverage(0.9).tensors() == {}


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_average_with_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.ema_decay"):
        WeightAverage(decay)
