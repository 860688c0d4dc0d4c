"""Images with a class each: folders of files, and scikit-learn's handwritten digits."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from strategies.errors import ConfigError
from strategies.world import World
from trainer.data.base import AbstractData, Data, Sample, Say
from trainer.data.language import in_validation
from trainer.place import at_home

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_MODES = {1: "L", 3: "RGB"}
_LARGEST = 1 << 13


class _File(NamedTuple):
    path: str
    label: int


def _name(file: _File) -> str:
    """That doesn't depend on where the folder lies."""
    return "/".join(Path(file.path).parts[-2:])


@dataclass(kw_only=True)
class AbstractImageData(AbstractData):
    """Images of one size, each of one class."""

    flip: bool = False
    """Mirror half of the images in training."""
    validation: float = 0.05
    """Share of the images that is held out, chosen by a hash of their names, hence stable; 0: none."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.validation < 1:
            raise ConfigError(
                f"{name}: validation={self.validation} is not a share. Use 0 up to below 1 (data.validation)."
            )
        if self.workers < 0:
            raise ConfigError(f"{name}: workers={self.workers} is negative. Use 0 or more (data.workers).")
        self._check()

    def _check(self) -> None:
        """Refuse further fields that are out of range."""

    def _data(self, train: Any, validation: Any, classes: Sequence[str], what: str) -> Data:
        if not len(train) or (self.validation and not len(validation)):
            raise ConfigError(
                f"{type(self).__name__}: validation={self.validation} splits {len(train) + len(validation)} images "
                f"into {len(train)} and {len(validation)}, and neither part may be empty. "
                "Change the share, or use 0 for no validation (data.validation)."
            )
        held_out = f" and {len(validation):,} to validate on" if len(validation) else ""
        return Data(
            train=train,
            validation=validation if len(validation) else None,
            classes=classes,
            description=f"{what}: {len(train):,} images of {len(classes)} classes to train on{held_out}",
        )


@final
@dataclass(kw_only=True)
class ImageFolderData(AbstractImageData):
    """A folder per class with its images: `<path>/<class>/*.jpg`."""

    path: str
    """The folder of the classes' folders."""
    validation_path: str | None = None
    """Another one to hold out; with it, the share `validation` isn't used."""
    size: int = 256
    """Sides of the square that is cut from an image's middle and scaled, in pixels; what it has more than the model
    takes is cut off at random in training."""
    channels: int = 3
    """3: colours; 1: shades of grey."""

    def _check(self) -> None:
        if not 1 <= self.size <= _LARGEST:
            raise ConfigError(
                f"ImageFolderData: size={self.size} is not in 1 to {_LARGEST} pixels. Try 256 (data.size)."
            )
        if self.channels not in _MODES:
            raise ConfigError(
                f"ImageFolderData: channels={self.channels} is neither 3 (colours) nor 1 (grey). "
                "Use one of them (data.channels)."
            )

    def build(self, world: World, cache: Path, say: Say) -> Data:
        with world.together():
            data = self._found()
        seen = world.gather([part.digest() for part in (data.train, data.validation) if isinstance(part, _Images)])
        if strange := [rank for rank, digests in enumerate(seen) if digests != seen[0]]:
            raise ConfigError(
                f"ImageFolderData: ranks 0 and {strange[0]} see different images in {self.path}. "
                "Give every machine the same files (data.path)."
            )
        return data

    def _found(self) -> Data:
        classes, files = _listed(self.path, "path")
        if self.validation_path is None:
            sides = [in_validation(_name(file), self.validation) for file in files]
            train = [file for file, held_out in zip(files, sides, strict=True) if not held_out]
            validation = [file for file, held_out in zip(files, sides, strict=True) if held_out]
        else:
            others, validation = _listed(self.validation_path, "validation_path")
            if others != classes:
                strange = sorted({*others} ^ {*classes})[0]
                raise ConfigError(
                    f"ImageFolderData: only one of {self.path} and {self.validation_path} has a class {strange!r}. "
                    "Give both the same (data.path, data.validation_path)."
                )
            train = files
        return self._data(
            _Images(train, self.size, self.channels, _TRAINING | {"flip": self.flip}),
            _Images(validation, self.size, self.channels, {}),
            classes,
            self.path,
        )


_TRAINING = {"crop": True}


def _listed(folder: str, key: str) -> tuple[list[str], list[_File]]:
    """The classes, by name, and all their files."""
    root = at_home(folder)
    try:
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = [
            _File(str(path), label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
    except OSError as error:
        raise ConfigError(
            f"ImageFolderData: {folder!r} can't be read: {error.strerror}. Name a folder of folders (data.{key})."
        ) from error
    if len(classes) < 2 or not files:
        raise ConfigError(
            f"ImageFolderData: {folder!r} holds {len(files)} images in {len(classes)} folders. Name one with a folder "
            f"for each of 2 or more classes, and in it their images (data.{key})."
        )
    return classes, files


class _Images:
    """Files, read when they are asked for."""

    def __init__(self, files: Sequence[_File], size: int, channels: int, more: dict[str, Any]) -> None:
        self._files, self._size, self._mode, self._more = files, size, _MODES[channels], more

    def __len__(self) -> int:
        return len(self._files)

    def digest(self) -> str:
        """Of the names of all files with their classes' folders, and of their order."""
        found = hashlib.blake2b(digest_size=16)
        for file in self._files:
            found.update(f"{_name(file)}\n".encode(errors="surrogatepass"))
        return found.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        path, label = self._files[index]
        return {"pixels": _read(path, self._size, self._mode), "label": label, **self._more}


def _read(path: str, size: int, mode: str) -> NDArray[np.uint8]:
    """uint8 [channels, size, size]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft(mode, (size, size))  # JPEG: decode no more than is needed
            square = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # each format's reader raises its own kinds
        raise ConfigError(
            f"ImageFolderData: {path} can't be read: it is damaged, or no image ({type(error).__name__}). "
            "Mend it, or take it away (data.path)."
        ) from error
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@final
@dataclass(kw_only=True)
class DigitsData(AbstractImageData):
    """1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn: real images that need no download.

    Source: UCI, Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998).
    """

    validation: float = 0.15
    """Share of the images that is held out, chosen by a hash of their number, hence stable; 0: none."""
    shift: int = 1
    """Pixels by which an image is moved at most in training."""

    def _check(self) -> None:
        if not 0 <= self.shift <= 8:
            raise ConfigError(f"DigitsData: shift={self.shift} is not in 0 to 8 pixels. Try 1 (data.shift).")

    def build(self, world: World, cache: Path, say: Say) -> Data:
        with world.together():
            return self._found()

    def _found(self) -> Data:
        if importlib.util.find_spec("sklearn") is None:
            raise ConfigError(
                "DigitsData: the package scikit-learn, of which the images are a part, is not installed. Install it, "
                "or use images of your own (data=images)."
            )
        from sklearn.datasets import load_digits

        shades, labels = load_digits(return_X_y=True)
        pixels = np.round(shades * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        moved = np.pad(pixels, ((0, 0), (0, 0), (self.shift, self.shift), (self.shift, self.shift)))
        train: list[Sample] = []
        validation: list[Sample] = []
        for index, label in enumerate(map(int, labels)):
            if in_validation(str(index), self.validation):
                validation.append({"pixels": pixels[index], "label": label})
            else:
                train.append({"pixels": moved[index], "label": label, **_TRAINING, "flip": self.flip})
        return self._data(train, validation, [str(digit) for digit in range(10)], "scikit-learn's digits")
