"""Which parts of a model are taken one at a time."""

from __future__ import annotations

import pytest
from torch import nn

from strategies.blocks import find_blocks
from strategies.errors import ConfigError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(4, 10)


class Says(Stack):
    _no_split_modules = ("Layer", "Absent")


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Says()


def names(model: nn.Module, *arguments: object) -> list[str]:
    known = {id(part): name for name, part in model.named_modules()}
    return [known[id(part)] for part in find_blocks(model, *arguments)]  # type: ignore[arg-type]


def test_blocks_are_what_the_model_names_itself() -> None:
    assert names(Says()) == ["layers.0", "layers.1"]
    assert names(Around()) == ["inner.layers.0", "inner.layers.1"]


def test_blocks_are_members_of_its_lists_where_it_names_none() -> None:
    assert names(Stack()) == ["layers.0", "layers.1"]
    assert names(nn.Sequential(nn.Linear(2, 2))) == []


def test_blocks_of_given_classes_none_inside_another() -> None:
    assert names(Says(), ["Linear"]) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]
    assert names(Says(), ["Linear", "Layer"]) == ["layers.0", "layers.1", "head"]


def test_blocks_by_size_are_the_smallest_that_reach_it() -> None:
    assert names(Stack(), (), 50) == ["layers.0", "layers.1", "head"]
    assert names(Stack(), (), 76) == ["layers.0", "layers.1"]
    assert names(Stack(), (), 77) == []  # a list of modules has no forward pass in which it could be gathered


def test_blocks_shared_by_two_places_are_found_once() -> None:
    model = Stack()
    model.layers.append(model.layers[0])
    assert names(model) == ["layers.0", "layers.1"]


def test_blocks_of_an_unknown_class_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no module of class 'Layr'\. It has Embedding, Layer,"):
        find_blocks(Says(), ["Layr"])
