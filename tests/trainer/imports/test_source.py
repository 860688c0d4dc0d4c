"""Names: what wrappers add to them, and whose the numbered parameters of an optimizer are."""

from __future__ import annotations

import pytest

from strategies.errors import ConfigError
from trainer.imports.source import Lazy, Source, lazy, names_of_groups

MODEL = [("embed", (9, 4)), ("up", (8, 4)), ("up_bias", (8,)), ("down", (4, 8)), ("norm", (4,)), ("out", (9, 4))]
WEIGHTS, REST = ["embed", "up", "down", "out"], ["up_bias", "norm"]


def shapes(names: list[str]) -> list[tuple[int, ...] | None]:
    return [dict(MODEL)[name] for name in names]


@pytest.mark.parametrize(
    "groups",
    [
        [[name for name, _ in MODEL]],
        [WEIGHTS, REST],
        [REST, WEIGHTS],
        [["up", "down", "out"], REST, ["embed"]],
        [["embed", "up"], [], ["up_bias", "down", "norm", "out"]],
    ],
)
def test_groups_are_named_by_the_one_way_in_which_their_shapes_fit(groups: list[list[str]]) -> None:
    assert names_of_groups([shapes(group) for group in groups], MODEL, "there") == groups


def test_parameter_without_state_may_have_any_shape() -> None:
    without: list[list[tuple[int, ...] | None]] = [[None if name == "up" else dict(MODEL)[name] for name in WEIGHTS]]
    assert names_of_groups([*without, shapes(REST)], MODEL, "there") == [WEIGHTS, REST]


def test_groups_that_shapes_do_not_tell_apart_ask_for_names() -> None:
    with pytest.raises(ConfigError, match=r"don't say whose they are.*--names"):
        names_of_groups([[(4,)], [(4,)]], [("first", (4,)), ("second", (4,))], "there")


def test_groups_of_another_model_are_refused_by_the_first_that_has_no_place() -> None:
    with pytest.raises(ConfigError, match=r"'up' of shape \(8, 4\) has no place"):
        names_of_groups([[(9, 4), (7, 4), (4, 8), (9, 4)], shapes(REST)], MODEL, "there")
    with pytest.raises(ConfigError, match="has 2 parameters, and this model 6"):
        names_of_groups([shapes(REST)], MODEL, "there")


def test_wrappers_are_taken_off_where_that_leads_to_a_known_name() -> None:
    wrapped = {
        "module.first.weight": "first.weight",
        "module.module.second.weight": "second.weight",
        "_orig_mod.module.layers.0._checkpoint_wrapped_module.weight": "layers.0.weight",
        "_fsdp_wrapped_module.layers.1._orig_mod.weight": "layers.1.weight",
        "module.kept": "module.kept",
        "unknown": "unknown",
    }
    known = {name: None for name in wrapped.values() if name != "unknown"}
    source = Source(what="", where="", ranks=1, weights={name: lazy(0) for name in wrapped})
    source.use_names(known)
    assert list(source.weights) == list(wrapped.values())


def test_masters_of_numbered_parameters_become_the_weights() -> None:
    half, whole = lazy(1.5), lazy(1.25)
    source = Source(what="", where="", ranks=1, weights={"a": half}, groups=[[{"fp32": whole, "exp_avg": lazy(0)}]])
    source.name_groups([["a"]])
    assert source.weights["a"] is whole
    assert list(source.moments["a"]) == ["exp_avg"]
    assert isinstance(source.moments["a"]["exp_avg"], Lazy)
