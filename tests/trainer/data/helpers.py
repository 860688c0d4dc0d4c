"""Samples, worlds and text files that the data tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from strategies.base import Batch
from strategies.world import World
from trainer.data.base import AbstractData, Data, Sample, Samples


def world(rank: int = 0, size: int = 1) -> World:
    """One rank as pure functions see it: no communication."""
    return World(
        rank=rank, size=size, data_rank=rank, data_size=size, device=torch.device("cpu"), store=dist.HashStore()
    )


def build(source: AbstractData, cache: Path, said: list[str] | None = None) -> Data:
    return source.build(world(), cache, (said if said is not None else []).append)


def tokens_of(samples: Samples) -> list[list[int]]:
    return [samples[index]["tokens"].tolist() for index in range(len(samples))]


class Numbers:
    """Sample i says i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return {"tokens": np.array([index])}


def collate(samples: list[Sample], seeds: list[int]) -> Batch:
    tokens = torch.tensor([int(sample["tokens"][0]) for sample in samples])
    return Batch(
        inputs={"tokens": tokens, "seeds": torch.tensor(seeds)},
        labels=tokens,
        num_targets=len(samples),
        num_tokens=len(samples),
    )


def seen(batch: Batch) -> list[tuple[int, int]]:
    """(sample, seed) of each row."""
    return list(zip(batch.inputs["tokens"].tolist(), batch.inputs["seeds"].tolist(), strict=True))


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def small_tokenizer(
    folder: Path, words: str = "the cat sat on a mat", end: str | None = "</s>", template: str | None = CHAT_TEMPLATE
) -> Path:
    """A folder with a fast tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "<user>", "<assistant>", *words.split()]
    model = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["</s>", "<user>", "<assistant>"])
    specials = {} if end is None else {"eos_token": end}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **specials)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
