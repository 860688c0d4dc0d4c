from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import masking_utils

from strategies.base import Batch
from trainer.data.base import Sample
from trainer.models.hf import Attention, HFModel
from trainer.models.tasks import Apart, CausalTask, MaskedTask

MakeTiny = Callable[..., HFModel]
RNG = np.random.default_rng(0)
FIRST, OTHER, SECOND, LONG = (RNG.integers(0, 256, size) for size in (9, 9, 12, 17))


def packed(*documents: np.ndarray[Any, Any]) -> Sample:
    numbers = [np.full(len(tokens), number, dtype=np.int32) for number, tokens in enumerate(documents)]
    return {"tokens": np.concatenate(documents), "documents": np.concatenate(numbers)}


def logits(model: HFModel, batch: Batch) -> Tensor:
    torch.manual_seed(1)
    module = model.make().double().eval()
    with torch.no_grad():
        return module(**batch.inputs).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_causal_model_sees_nothing_of_the_document_before(tiny: MakeTiny, architecture: str, attention: str) -> None:
    model = tiny(architecture, attention=Attention[attention])
    task = model.task()
    here = logits(model, task.collate([packed(FIRST, SECOND), packed(LONG)], [0, 0]))
    changed = logits(model, task.collate([packed(OTHER, SECOND), packed(LONG)], [0, 0]))
    alone = logits(model, task.collate([packed(SECOND)], [0]))
    neighbour = logits(model, task.collate([packed(LONG)], [0]))
    inputs_of_second = slice(9, 20)
    assert torch.equal(here[0, inputs_of_second], changed[0, inputs_of_second])
    assert (here[0, :9] - changed[0, :9]).abs().max() > 1e-3  # the change was one
    # Eager attention has its softmax in float32.
    torch.testing.assert_close(here[0, inputs_of_second], alone[0], rtol=0, atol=1e-12 if attention == "sdpa" else 1e-6)
    torch.testing.assert_close(here[1, :16], neighbour[0], rtol=0, atol=1e-12 if attention == "sdpa" else 1e-6)


def test_causal_model_without_restarting_positions_sees_the_document_before(tiny: MakeTiny) -> None:
    # That the test above can fail.
    model = tiny("llama")
    task = model.task()
    assert isinstance(task, CausalTask)
    task.apart = Apart.no
    one = logits(model, task.collate([packed(FIRST, SECOND)], [0]))
    two = logits(model, task.collate([packed(OTHER, SECOND)], [0]))
    assert (one[0, 9:] - two[0, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_model_sees_nothing_of_other_documents(tiny: MakeTiny, attention: str) -> None:
    model = tiny("bert", attention=Attention[attention], noise=0.01)
    task = model.task()
    one, two = (task.collate([packed(first, SECOND), packed(LONG)], [5, 5]) for first in (FIRST, OTHER))
    for batch in (one, two):  # nothing hidden in the second document
        batch.inputs["input_ids"][0, 9:21] = torch.from_numpy(SECOND)
    here, changed = logits(model, one), logits(model, two)
    assert torch.equal(here[0, 9:21], changed[0, 9:21])
    assert (here[0, :9] - changed[0, :9]).abs().max() > 1e-3
    assert here.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "apart"),
    [
        ("llama", Apart.positions),
        ("mixtral", Apart.positions),
        ("opt", Apart.no),  # takes positions, but doesn't hand them to the mask
        ("bloom", Apart.no),  # has none
        ("mamba", Apart.no),  # is recurrent
        ("bert", Apart.bool_mask),
    ],
)
def test_prepare_recognises_what_a_model_can(tiny: MakeTiny, architecture: str, apart: Apart) -> None:
    task = tiny(architecture).task()
    assert isinstance(task, CausalTask | MaskedTask)
    assert task.apart is apart


def test_collate_for_a_model_that_cannot_says_so_once(tiny: MakeTiny, caplog: pytest.LogCaptureFixture) -> None:
    task = tiny("mamba").task()
    for _ in range(2):
        batch = task.collate([packed(FIRST, SECOND)], [0])
    assert set(batch.inputs) == {"input_ids"}
    assert len([record for record in caplog.records if "can't keep the documents" in record.message]) == 1


def test_collate_for_flash_attention_lays_rows_end_to_end() -> None:
    task = CausalTask(apart=Apart.flat_positions)
    batch = task.collate([packed(FIRST, SECOND), packed(LONG)], [0, 0])
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (1, 48)
    positions = batch.inputs["position_ids"][0].tolist()
    assert positions[:20] == [*range(9), *range(11)]
    assert positions[24:40] == [*range(16)]
    assert batch.inputs["input_ids"][0, 24:40].tolist() == LONG[:-1].tolist()
    plain = CausalTask(apart=Apart.flat_positions).collate([packed(LONG), packed(LONG)], [0, 0])
    assert plain.inputs["input_ids"].shape == (2, 16)


def test_model_that_numbers_positions_itself_searches_no_documents(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny("llama").make()
    searched: list[Tensor] = []
    search = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(search, "_original", lambda positions: searched.append(positions))
    with pytest.raises(IndexError):
        module(input_ids=torch.tensor([[1 << 20]]))  # a pass that fails leaves nothing behind either
    inputs = torch.from_numpy(LONG)[None]
    ours = module(input_ids=inputs).logits
    assert not searched
    theirs = module(input_ids=inputs, position_ids=torch.arange(17)[None]).logits
    assert len(searched) == 1
    assert torch.equal(ours, theirs)
