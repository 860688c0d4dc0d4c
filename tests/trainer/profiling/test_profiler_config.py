"""`profiler=...` on the command line."""

from __future__ import annotations

import pytest

from strategies.errors import ConfigError
from trainer.config import compose, made
from trainer.profiling import AbstractProfiler
from trainer.profiling.nsight import NsightProfiler
from trainer.profiling.torch_profiler import TorchProfiler


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], None),
        (["profiler=null"], None),
        (["profiler=torch", "profiler.start=7", "profiler.ranks=[0,3]"], TorchProfiler(start=7, ranks=[0, 3])),
        (["+profiler=nsight", "profiler.steps=1"], NsightProfiler(steps=1)),
    ],
    ids=str,
)
def test_profiler_is_chosen(words: list[str], wanted: AbstractProfiler | None) -> None:
    config = compose(words)
    assert (None if config.profiler is None else made(config.profiler)) == wanted


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["profiler=kineto"], r"profiler=kineto is not a choice\. Choices: nsight, torch"),
        (["profiler.start=5"], r"nothing is chosen for profiler\. Choose one: profiler=\.\.\. of nsight, torch"),
        (["profiler=torch", "profiler.strat=5"], r"no key 'profiler\.strat'\. Nearest: start"),
        (["profiler=nsight", "profiler.warmup=1"], r"no key 'profiler\.warmup'"),
        (["profiler=torch", "profiler.ranks=0"], r"profiler\.ranks"),
        (["profiler=torch", "profiler.steps=some"], r"profiler\.steps"),
    ],
    ids=str,
)
def test_profiler_that_makes_no_sense_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        compose(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("every", [0, -1])
def test_communication_every_below_one_is_refused(every: int) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.communication_every"):
        made(compose([f"trainer.communication_every={every}"]).trainer)
