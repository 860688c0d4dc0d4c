"""What words of a sweep mean, and one line for those that mean nothing."""

from __future__ import annotations

import pytest

from strategies.errors import ConfigError
from trainer.launch.space import Categorical, Continuous, Integer, Parameter, combinations, edges, search_space


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a.b=1,2", Categorical(key="a.b", values=("1", "2"))),
        ("a=x,'y z',null", Categorical(key="a", values=("x", "'y z'", "null"))),
        ("a=[1,2],[3]", Categorical(key="a", values=("[1,2]", "[3]"))),
        ("+a=shuffle(range(1,3))", Categorical(key="+a", values=("1", "2"))),
        ("schedule=glob(co*)", Categorical(key="schedule", values=("constant", "cosine"))),
        ("a=range(1,5)", Integer(key="a", low=1, high=4)),
        ("a=range(8,64,8)", Integer(key="a", low=8, high=56, step=8)),
        ("a=range(5,1,-2)", Integer(key="a", low=3, high=5, step=2)),
        ("a=range(0,1,0.25)", Continuous(key="a", low=0.0, high=0.75, step=0.25)),
        ("a=range(0.1,0.35,0.1)", Continuous(key="a", low=0.1, high=0.3, step=0.1)),
        ("a=tag(log,range(1,9))", Integer(key="a", low=1, high=8, log=True)),
        ("a=interval(1,4)", Continuous(key="a", low=1.0, high=4.0)),
        ("a=int(interval(1,4))", Integer(key="a", low=1, high=4)),
        ("a=tag(log,interval(1e-4,1e-1))", Continuous(key="a", low=1e-4, high=1e-1, log=True)),
    ],
)
def test_search_space_of_a_word_is_its_range(word: str, expected: Parameter) -> None:
    found = search_space(["seed=1", word, "logger=[a,b]"])
    assert found.fixed == ("seed=1", "logger=[a,b]")
    [parameter] = found.parameters
    if "shuffle" in word or "glob" in word:
        assert isinstance(parameter, Categorical)
        parameter = Categorical(key=parameter.key, values=tuple(sorted(parameter.values)))
    assert parameter == expected


def test_combinations_are_each_value_with_each_other_one() -> None:
    fixed, jobs = combinations(["a=1,2", "text='x y',z", "fixed='p,q'", "b=range(3)"])
    assert fixed == ["fixed='p,q'"]
    assert len(jobs) == 12
    assert jobs[:4] == [("a=1", "text='x y'", "b=0"), ("a=1", "text='x y'", "b=1"), ("a=1", "text='x y'", "b=2"),
                        ("a=1", "text=z", "b=0")]  # fmt: skip


def test_combinations_of_nothing_are_one_job() -> None:
    assert combinations(["a=1"]) == (["a=1"], [()])


def test_edges_hold_every_choice_and_both_ends_of_every_range() -> None:
    found = edges(search_space(["a=x,y,z", "b=interval(0.5,1)", "c=range(1,4)"]))
    assert found == [("a=x", "b=0.5", "c=1"), ("a=y", "b=1.0", "c=3"), ("a=z", "b=0.5", "c=1")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a=1,1"], "'a=1,1' holds 1 twice"),
        (["a=range(3,3)"], "holds no value"),
        (["a=range(1,2,0)"], "holds no value"),
        (["a=range(0.1,0.2,0.0)"], "holds no value"),
        (["a=interval(0,1)"], "holds more values than can be tried"),
        (["a=[1"], "can't read the argument 'a=[1'"),
        (["a=1,2", "a=3"], "a varies and is given twice"),
        (["run.dir=x"], "'run.dir=x' doesn't go with --multirun"),
        (["run.name=x,y"], "doesn't go with --multirun"),
        (["hydra.sweep.dir=x"], "doesn't go with --multirun"),
        (["--cfg"], "--cfg doesn't go with --multirun"),
    ],
)
def test_combinations_of_a_wrong_word_are_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        combinations(words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("a=interval(2,1)", "Give a lower end, then a higher one"),
        ("a=tag(log,interval(0,1))", "Give a lower end and above 0"),
        ("a=tag(log,range(0,5))", "orders of magnitude"),
        ("a=tag(log,range(1,9,2))", "orders of magnitude"),
        ("a=tag(lag,interval(1,2))", "has the tag lag, which means nothing here"),
    ],
)
def test_search_space_of_a_wrong_range_is_refused_in_one_line(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        search_space([word])
    assert told in str(error.value)
