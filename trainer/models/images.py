"""Images to tensors: cut, mirrored, normalised; and the class of a whole image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.data.base import Sample
from trainer.models.tasks import AbstractClassificationTask

_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What a model wants images to be."""

    channels: int = 3
    height: int = 224
    width: int = 224
    patches: int = 0
    """Tokens that an image is for the model; 0: it knows none."""
    mean: Sequence[float] = ()
    """Of each channel, in units of the largest value; empty: 0.5."""
    std: Sequence[float] = ()
    """By which each channel is divided; empty: 0.5."""

    @classmethod
    def of(cls, config: Any, path: str | None, **options: Any) -> Pixels:
        """As a model's configuration says, and, where it is pretrained, the description of its images beside it.

        Args:
            config: of `transformers`.
            path: folder or hub name of the pretrained model.
            options: for the hub.
        """
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        patch = getattr(config, "patch_size", None)
        described = _described(path, options)
        return cls(
            channels=int(getattr(config, "num_channels", 3)),
            height=int(height),
            width=int(width),
            patches=(height // patch) * (width // patch) if isinstance(patch, int) and patch > 0 else 0,
            mean=tuple(described.get("image_mean") or ()),
            std=tuple(described.get("image_std") or ()),
        )

    def scaled(self, images: NDArray[np.uint8]) -> Tensor:
        """float32 [n, channels, height, width], normalised; from uint8 of the same shape."""
        mean, std = (
            np.asarray(values or [_HALF] * self.channels, dtype=np.float32).reshape(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std)

    def save(self, folder: Path) -> None:
        """Write the `preprocessor_config.json` from which transformers makes the same tensors."""
        values = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.height, "width": self.width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean or [_HALF] * self.channels),
            "image_std": list(self.std or [_HALF] * self.channels),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _described(path: str | None, options: dict[str, Any]) -> dict[str, Any]:
    if path is None:
        return {}
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return dict(ImageProcessingMixin.get_image_processor_dict(path, **options)[0])
    except (OSError, ValueError):  # it has none
        return {}


@final
@dataclass(kw_only=True)
class ImageTask(AbstractClassificationTask):
    """The class of an image."""

    pixels: Pixels = field(default_factory=Pixels)

    def collate(self, samples: list[Sample], seeds: list[int]) -> Batch:
        images = np.stack([self._cut(sample, seed) for sample, seed in zip(samples, seeds, strict=True)])
        return Batch(
            inputs={"pixel_values": self.pixels.scaled(images)},
            labels=self.labels_of(samples),
            num_targets=len(samples),
            num_tokens=len(samples) * self.pixels.patches,
        )

    def _cut(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = sample["pixels"]
        wanted = self.pixels
        channels, height, width = image.shape
        if channels != wanted.channels or height < wanted.height or width < wanted.width:
            raise ConfigError(
                f"ImageTask: an image has {channels} channels of {height} x {width} pixels, and the model takes "
                f"{wanted.channels} of {wanted.height} x {wanted.width}. Make one fit the other (data.size, "
                "data.channels, model.config.image_size, model.config.num_channels)."
            )
        random = np.random.default_rng(seed)
        spare = (height - wanted.height, width - wanted.width)
        top, left = random.integers(0, spare, endpoint=True) if sample.get("crop") else (size // 2 for size in spare)
        cut = image[:, top : top + wanted.height, left : left + wanted.width]
        return cut[:, :, ::-1] if sample.get("flip") and random.random() < _HALF else cut
