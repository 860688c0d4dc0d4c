"""Images from folders and from scikit-learn, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from strategies.backends import GlooBackend
from strategies.ddp import DDPStrategy
from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.starts import start
from tests.trainer.data.helpers import build
from trainer.data import DigitsData, ImageFolderData


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six red squares and six blue ones, as PNG and JPEG."""
    for number in range(6):
        picture(tmp_path / "photos" / "red" / f"{number}.png", (255, 0, 0))
        picture(tmp_path / "photos" / "blue" / f"{number}.jpg", (0, 0, 255))
    (tmp_path / "photos" / "red" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_folder_gives_each_image_once_with_its_class(photos: Path, tmp_path: Path) -> None:
    data = build(ImageFolderData(path=str(photos), size=8, validation=0.3, flip=True), tmp_path / "cache")
    assert list(data.classes) == ["blue", "red"]
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 12
    for part, keys in ((data.train, {"pixels", "label", "crop", "flip"}), (data.validation, {"pixels", "label"})):
        for index in range(len(part)):
            sample = part[index]
            assert set(sample) == keys
            assert sample["pixels"].shape == (3, 8, 8)
            assert sample["pixels"].dtype == np.uint8
            assert sample["pixels"].mean(axis=(1, 2)).argmax() == {0: 2, 1: 0}[sample["label"]]


def test_folder_held_out_is_the_other_folder(photos: Path, tmp_path: Path) -> None:
    picture(tmp_path / "other" / "red" / "a.png", (255, 0, 0))
    (tmp_path / "other" / "blue").mkdir()
    data = build(ImageFolderData(path=str(photos), validation_path=str(tmp_path / "other")), tmp_path / "cache")
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (12, 1)
    assert data.validation[0]["label"] == 1


def test_folder_grey_has_one_channel_and_keeps_what_is_in_the_middle(tmp_path: Path) -> None:
    image = Image.new("L", (30, 10), 0)
    image.paste(200, (10, 0, 20, 10))
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        image.save(tmp_path / "grey" / name / "x.png")
    data = build(ImageFolderData(path=str(tmp_path / "grey"), size=10, channels=1, validation=0.0), tmp_path / "cache")
    assert data.train[0]["pixels"].shape == (1, 10, 10)
    assert (data.train[0]["pixels"] == 200).all()


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    data = build(DigitsData(shift=2), tmp_path / "cache")
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 1797
    assert 0.1 < len(data.validation) / 1797 < 0.2
    assert data.train[0]["pixels"].shape == (1, 12, 12)
    sample = data.validation[0]
    assert sample["pixels"].shape == (1, 8, 8)
    assert sample["pixels"].max() == 255
    again = build(DigitsData(), tmp_path / "cache")
    assert again.validation is not None
    assert (again.validation[0]["pixels"] == sample["pixels"]).all()


def test_folder_that_is_none_is_refused(photos: Path, tmp_path: Path) -> None:
    picture(tmp_path / "one" / "red" / "a.png", (255, 0, 0))
    picture(tmp_path / "more" / "green" / "a.png", (255, 0, 0))
    picture(tmp_path / "more" / "red" / "a.png", (255, 0, 0))
    for settings, words in [
        ({"path": str(tmp_path / "nothing")}, "data.path"),
        ({"path": str(tmp_path / "one")}, "1 images in 1 folders"),
        ({"path": str(photos), "validation_path": str(tmp_path / "more")}, "a class 'blue'"),
        ({"path": str(photos), "validation": 1e-9}, "neither part may be empty"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            build(ImageFolderData(**settings), tmp_path)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def on_this_rank(folder: str) -> str:
    strategy = DDPStrategy()
    world = strategy.connect(GlooBackend())
    try:
        ImageFolderData(path=f"{folder}/{world.rank}", validation=0.0).build(world, Path(folder), print)
    except ConfigError as error:
        return str(error)
    finally:
        strategy.close()
    return ""


def test_folders_that_differ_between_ranks_are_refused_on_all(workers: Workers, tmp_path: Path) -> None:
    for rank, name in enumerate(("a.png", "b.png")):
        picture(tmp_path / str(rank) / "red" / name, (255, 0, 0))
        picture(tmp_path / str(rank) / "blue" / "c.png", (0, 0, 255))
    heard = workers.run(on_this_rank, 2, str(tmp_path))
    assert all("ranks 0 and 1 see different images" in said for said in heard)
    (tmp_path / "1" / "red" / "b.png").rename(tmp_path / "1" / "red" / "a.png")
    assert workers.run(on_this_rank, 2, str(tmp_path)) == ["", ""]


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"size": 1 << 20}, {"channels": 2}, {"validation": 1.0}, {"workers": -1}]
)
def test_folder_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}"):
        ImageFolderData(path="x", **settings)  # type: ignore[arg-type]


VIT = ("model=vit_tiny", "model.config.num_channels=3", "model.config.hidden_size=16", "model.num_labels=2",
       "model.config.intermediate_size=16", "model.config.num_hidden_layers=1", "data=images", "data.size=10",
       "data.validation=0", "data.workers=1",
       "trainer.global_batch=4", "trainer.micro_batch=1", "trainer.max_steps=20",
       "hooks=[]", "logger=[]")  # fmt: skip


def test_damaged_image_is_one_line_and_exit_code_2(workers: Workers, photos: Path, tmp_path: Path) -> None:
    (photos / "red" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    [answer] = workers.run(start, 1, [*VIT, f"data.path={photos}", f"run.dir={tmp_path / 'run'}"])
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "red/3.png can't be read" in answer.err
