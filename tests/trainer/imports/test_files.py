"""Files that somebody else wrote: what isn't needed isn't read, nothing in them runs, and each refusal is one line."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from strategies.errors import ConfigError
from trainer.imports import open_source
from trainer.imports.files import StandIn, load

MARK = "IMPORTS_MARK"


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return (self.function, (os.environ[MARK],))


class Mine:
    """Somebody's own state."""

    def __init__(self) -> None:
        self.epoch = 3


class Stage(IntEnum):
    """As DeepSpeed's `ZeroStageEnum`."""

    two = 2


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Appears when something hostile was run."""
    path = tmp_path / "run-by-a-file"
    monkeypatch.setenv(MARK, str(path))
    return path


def deepspeed_folder(folder: Path, **more: Any) -> Path:
    """A stage-0 checkpoint of one linear layer."""
    module = nn.Linear(2, 3)
    optimizer = AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_shapes": None,
        "global_steps": 1,
    }
    folder.mkdir(parents=True)
    torch.save({**state, **more}, folder / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, eval, shutil.rmtree, torch.load], ids=lambda f: f.__qualname__
)
def test_hostile_deepspeed_file_is_refused_by_the_name_of_what_it_asks_for(
    tmp_path: Path, mark: Path, function: Any
) -> None:
    folder = deepspeed_folder(tmp_path / "there", mine=Evil(function))
    with pytest.raises(ConfigError, match="asks for") as caught:
        open_source(folder)
    assert function.__qualname__ in str(caught.value)
    assert not mark.exists()
    with pytest.raises(ConfigError) if function.__module__ in ("posix", "nt") else _nothing():
        open_source(folder, [f"{function.__module__}.{function.__qualname__}"])  # nothing comes of insisting
    assert not mark.exists()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_hostile_index_of_a_sharded_folder_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "there" / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(os.mkdir)))
    with pytest.raises(ConfigError, match="mkdir has no place"):
        open_source(tmp_path / "there")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.bin", "scaler.pt"])
def test_hostile_file_of_accelerate_is_refused(tmp_path: Path, mark: Path, name: str) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"state": Evil(os.mkdir)}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"asks for (posix|nt)\.mkdir"):
        open_source(tmp_path)
    assert not mark.exists()


def test_own_class_is_left_out_on_request_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "absent_module.py").write_text("class Mine:\n    def __init__(self):\n        self.epoch = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import absent_module  # type: ignore[import-not-found]

    there = {"mine": absent_module.Mine(), "more": argparse.Namespace(a=1)}
    folder = deepspeed_folder(tmp_path / "there", client=there)
    monkeypatch.delitem(sys.modules, "absent_module")
    monkeypatch.delattr(absent_module, "Mine")
    with pytest.raises(ConfigError, match=r"--ignore absent_module\.Mine"):
        open_source(folder)
    assert open_source(folder, ["absent_module.Mine"]).step == 1
    assert "absent_module" not in sys.modules


def test_what_deepspeed_keeps_in_objects_is_read_without_its_classes(tmp_path: Path) -> None:
    torch.save({"stage": Stage.two, "mine": Mine()}, tmp_path / "file.pt")
    found = load(tmp_path / "file.pt", [f"{__name__}.Stage", f"{__name__}.Mine"])
    assert isinstance(found["stage"], StandIn)
    assert found["mine"].state == {"epoch": 3}


@pytest.mark.parametrize("damage", ["cut", "empty", "legacy", "pickle"])
def test_damaged_file_is_one_line(tmp_path: Path, damage: str) -> None:
    file = deepspeed_folder(tmp_path / "there") / "mp_rank_00_model_states.pt"
    whole = file.read_bytes()
    if damage == "legacy":
        torch.save({"module": {}}, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "pickle": pickle.dumps({"module": 1})}[damage])
    with pytest.raises(ConfigError, match="can't be read") as caught:
        open_source(file.parent)
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds nothing of DeepSpeed"):
        open_source(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(ConfigError, match=r"names '\.\./elsewhere'"):
        open_source(tmp_path)
    for name, says in (
        ("mp_rank_01_model_states.pt", "tensor or pipeline parallelism"),
        ("layer_00-model_states.pt", "pipeline parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "parallelism|experts"),
    ):
        folder = deepspeed_folder(tmp_path / name.partition(".")[0])
        (folder / name).touch()
        with pytest.raises(ConfigError, match=says):
            open_source(folder)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "optimizer_1.bin").touch()
    with pytest.raises(ConfigError, match="two optimizers"):
        open_source(tmp_path / "two")


def test_zero_without_the_parts_of_all_ranks_says_how_many(tmp_path: Path) -> None:
    folder = deepspeed_folder(
        tmp_path / "there", param_shapes=[{"weight": torch.Size([3, 2])}], buffer_names=[], dp_world_size=4
    )
    with pytest.raises(ConfigError, match="the parts of 0 ranks of 4"):
        open_source(folder)


def test_weights_in_several_files_of_safetensors_are_one_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for number, name in enumerate(("first", "second"), start=1):
        save_file({name: torch.full((2,), float(number))}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    found = open_source(tmp_path)
    assert {name: value.read().tolist() for name, value in found.weights.items()} == {"first": [1, 1], "second": [2, 2]}
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="doesn't tell its step"):
        open_source(tmp_path)
