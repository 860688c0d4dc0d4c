"""Images become the tensors that transformers would make, cut and mirrored by their seeds alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strategies.errors import ConfigError
from strategies.testing import Workers
from tests.starts import start
from trainer.models import HFModel, ImageTask
from trainer.models.images import Pixels
from trainer.models.objectives import Objective

VIT: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16,
                       "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
TASK = ImageTask(num_labels=3, pixels=Pixels(height=8, width=8, patches=4))


def image(side: int = 12, **more: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)
    return {"pixels": pixels, "label": 2, **more}


def cut(sample: dict[str, Any], seed: int) -> torch.Tensor:
    found: torch.Tensor = TASK.collate([sample], [seed]).inputs["pixel_values"][0]
    return found


def test_image_without_leave_to_vary_is_its_middle_whatever_the_seed() -> None:
    middle = TASK.pixels.scaled(image()["pixels"][None, :, 2:10, 2:10])[0]
    for seed in range(5):
        assert torch.equal(cut(image(), seed), middle)


def test_image_is_varied_by_its_seed_alone() -> None:
    sample = image(crop=True, flip=True)
    whole = TASK.pixels.scaled(sample["pixels"][None])[0]
    parts = {
        (top, left, mirrored): part.flip(-1) if mirrored else part
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)
        for part in [whole[:, top : top + 8, left : left + 8]]
    }
    seen = set()
    for seed in range(400):
        found = cut(sample, seed)
        assert torch.equal(found, cut(sample, seed))
        [place] = [place for place, part in parts.items() if torch.equal(part, found)]
        seen.add(place)
    assert seen == set(parts)


def test_batch_counts_images_as_targets_and_patches_as_tokens() -> None:
    batch = TASK.collate([image(), image()], [0, 1])
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert batch.inputs["pixel_values"].dtype == torch.float32
    assert (batch.labels.tolist(), batch.num_targets, batch.num_tokens) == ([2, 2], 2, 8)


def test_tensors_are_those_of_the_exported_processor(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3})
    )
    config = type("Config", (), {"image_size": 8, "patch_size": 4, "num_channels": 3})()
    for pixels in (Pixels.of(config, str(tmp_path)), Pixels.of(config, None)):
        pixels.save(tmp_path)
        processor = ViTImageProcessorPil.from_pretrained(tmp_path)
        values = image(8)["pixels"]
        theirs = processor(values, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        assert torch.allclose(pixels.scaled(values[None]), theirs, atol=1e-6)
    assert Pixels.of(config, str(tmp_path)).mean == (0.5,) * 3


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (image(7), "3 channels of 7 x 7 pixels"),
        ({**image(), "pixels": image()["pixels"][:1]}, "1 channels of 12 x 12"),
        ({**image(), "label": 3}, "label 3"),
        ({**image(), "label": None}, "label None"),
    ],
)
def test_image_that_does_not_fit_is_refused(sample: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TASK.collate([sample], [0])


def test_prepared_model_takes_what_its_task_makes() -> None:
    model = HFModel(architecture="vit", objective=Objective.image_classification, num_labels=3, config=VIT)
    model.prepare(None)
    task = model.task()
    torch.manual_seed(0)
    batch = task.collate([image(), image()], [0, 1])
    outputs = model.make()(**batch.inputs)
    assert outputs.logits.shape == (2, 3)
    assert task.loss(outputs, batch).loss.item() == pytest.approx(2 * np.log(3), rel=0.1)
    value, weight = task.metrics(outputs, batch.weightless())["accuracy"]
    assert (value.item(), weight.item()) == (0, 0)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=vit_tiny"], ["its samples are text", "model.objective=causal"]),
        (["data=digits"], ["its samples are images", "image_classification"]),
        (["model=vit_tiny", "data=digits", "model.num_labels=9"], ["9", "model.num_labels"]),
        (["model=vit_tiny", "data=digits", "model.config.image_size=16"], ["16 x 16", "data.size"]),
        (["model=vit_tiny", "model.num_labels=null"], ["image_classification with num_labels=None"]),
        (["model=vit_tiny", "data=digits", "data.shift=-1"], ["data.shift"]),
        (["model=llama_tiny", "model.objective=image_classification", "model.num_labels=2"], ["llama", "objective"]),
    ],
)
def test_model_and_data_that_do_not_fit_are_refused_in_one_line(
    workers: Workers, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    [found] = workers.run(start, 1, [*words, "hooks=[]", "logger=[]", f"run.dir={tmp_path / 'run'}"])
    assert found.code == 2, found.err
    assert found.err.count("\n") == 1
    assert all(part in found.err for part in parts), found.err
