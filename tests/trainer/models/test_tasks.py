from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.models.tasks import Apart, CausalTask, ClassificationTask, MaskedTask, Seq2SeqTask, summed_cross_entropy


def sample(*tokens: int, **more: Any) -> dict[str, Any]:
    return {"tokens": np.asarray(tokens, dtype=np.int64), **more}


def outputs(logits: Tensor, **more: Any) -> Any:
    return SimpleNamespace(logits=logits, **more)


# Causal.


def test_causal_collate_shifts_and_leaves_out_what_does_not_count() -> None:
    batch = CausalTask().collate([sample(1, 2, 3, 4, counts=np.array([True, False, True, True]))], [0])
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert batch.labels.tolist() == [[-100, 3, 4]]
    assert (batch.num_targets, batch.num_tokens) == (2, 3)


def test_causal_collate_of_equal_lengths_has_no_mask_and_no_padding() -> None:
    batch = CausalTask().collate([sample(1, 2, 3, 4), sample(5, 6, 7, 8)], [0, 0])
    assert set(batch.inputs) == {"input_ids"}
    assert batch.labels.shape == (2, 3)


def test_causal_collate_of_unequal_lengths_pads_to_a_multiple_of_eight() -> None:
    batch = CausalTask(padding=9).collate([sample(1, 2, 3), sample(*range(11))], [0, 0])
    assert batch.inputs["input_ids"].shape == (2, 16)
    assert batch.inputs["input_ids"][0].tolist() == [1, 2] + [9] * 14
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [2, 10]
    assert batch.labels[0].tolist() == [2, 3] + [-100] * 14
    assert (batch.num_targets, batch.num_tokens) == (12, 12)


def test_causal_collate_with_a_boundary_restarts_positions() -> None:
    documents = np.array([0, 0, 1, 1, 1], dtype=np.int32)

    batch = CausalTask(apart=Apart.positions).collate(
        [sample(1, 2, 3, 4, 5, documents=documents), sample(6, 7)], [0, 0]
    )
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6]]


def test_causal_collate_with_a_boundary_before_the_last_token_only_needs_no_positions() -> None:
    documents = np.array([0, 0, 0, 1], dtype=np.int32)
    batch = CausalTask().collate([sample(1, 2, 3, 4, documents=documents)], [0])
    assert set(batch.inputs) == {"input_ids"}
    assert batch.labels.tolist() == [[2, 3, 4]]


def test_causal_collate_never_pads_beyond_the_model() -> None:
    task = CausalTask(limit=10)
    assert task.collate([sample(1, 2), sample(*range(11))], [0, 0]).labels.shape == (2, 10)
    with pytest.raises(ConfigError, match=r"a sample has 11 tokens, and the model knows 10 positions"):
        task.collate([sample(*range(12))], [0])


def test_causal_collate_of_a_single_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer than 2 tokens"):
        CausalTask().collate([sample(1)], [0])


# Losses.


def test_loss_is_the_sum_over_counted_positions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    terms = CausalTask().loss(outputs(logits), Batch(inputs={}, labels=labels, num_targets=3))
    probabilities = logits.log_softmax(dim=-1)
    expected = -(probabilities[0, 0, 1] + probabilities[0, 2, 2] + probabilities[1, 2, 4])
    assert terms.loss.dtype is torch.float64
    torch.testing.assert_close(terms.loss, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_low_precision_logits_is_made_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 7).to(dtype)
    labels = torch.tensor([1, 2, -100, 3])
    found = summed_cross_entropy(logits, labels)
    assert found.dtype is torch.float32
    assert torch.equal(found, F.cross_entropy(logits.float(), labels, reduction="sum"))


def test_loss_with_nothing_counted_is_zero_with_a_graph() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    labels = torch.full((1, 2), -100)
    loss = CausalTask().loss(outputs(logits), Batch(inputs={}, labels=labels, num_targets=0)).loss
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_loss_of_a_model_with_experts_has_its_balance_apart() -> None:
    batch = Batch(inputs={}, labels=torch.tensor([[1]]), num_targets=1)
    made = outputs(torch.zeros(1, 1, 4), aux_loss=torch.tensor(3.0))
    terms = CausalTask(auxiliary_weight=0.5).loss(made, batch)
    assert terms.auxiliary is not None
    assert terms.auxiliary.item() == 1.5
    assert terms.loss.item() == pytest.approx(np.log(4))
    assert CausalTask().loss(made, batch).auxiliary is None


def test_accuracy_counts_only_counted_positions() -> None:
    logits = F.one_hot(torch.tensor([[1, 2, 3]]), 5).float()
    batch = Batch(inputs={}, labels=torch.tensor([[1, 4, -100]]), num_targets=2)
    hits, weight = CausalTask().metrics(outputs(logits), batch)["accuracy"]
    assert (hits.item(), weight.item()) == (1.0, 2.0)


# Masked.


def masked(**fields: Any) -> MaskedTask:
    return MaskedTask(mask=99, vocabulary_size=90, never=(50,), padding=51, **fields)


def test_masked_collate_asks_only_for_what_it_chose() -> None:
    tokens = [50, *range(40)]
    batch = masked().collate([sample(*tokens), sample(50, 1, 2)], [3, 4])
    assert batch.inputs["input_ids"].shape == (2, 48)
    assert batch.num_targets == int((batch.labels != -100).sum()) == 6 + 1
    assert batch.num_tokens == 44
    chosen = batch.labels[0] != -100
    assert not chosen[0]
    row = torch.tensor(tokens + [51] * 7)
    assert torch.equal(batch.labels[0][chosen], row[chosen])
    assert torch.equal(batch.inputs["input_ids"][0][~chosen], row[~chosen])


def test_masked_collate_is_a_function_of_each_seed() -> None:
    rows = [sample(*range(40)), sample(*range(40))]
    one, two = masked().collate(rows, [3, 4]), masked().collate(rows[::-1], [4, 3])
    assert torch.equal(one.labels[0], two.labels[1])
    assert torch.equal(one.inputs["input_ids"][0], two.inputs["input_ids"][1])
    assert not torch.equal(one.labels[0], one.labels[1])


# Sequence to sequence.


def test_seq2seq_collate_with_a_source_reads_it_and_answers_tokens() -> None:
    task = Seq2SeqTask(start=0, padding=9)
    rows = [
        sample(1, 2, 3, source_tokens=np.array([7, 8]), counts=np.array([True, True, False])),
        sample(4, source_tokens=np.array([5, 6])),
    ]
    batch = task.collate(rows, [0, 0])
    assert batch.inputs["input_ids"].tolist() == [[7, 8], [5, 6]]
    assert "attention_mask" not in batch.inputs
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 1, 2, 9, 9, 9, 9, 9], [0] + [9] * 7]
    assert batch.labels.tolist() == [[1, 2] + [-100] * 6, [4] + [-100] * 7]
    assert (batch.num_targets, batch.num_tokens) == (3, 8)


def test_seq2seq_collate_with_sentinels_hides_spans() -> None:
    task = Seq2SeqTask(start=0, sentinels=(100, 99, 98, 97))
    one, again = (task.collate([sample(*range(1, 41))], [5]) for _ in range(2))
    other = task.collate([sample(*range(1, 41))], [6])
    assert one.labels[0, 0] == 100
    assert 100 in one.inputs["input_ids"]
    assert torch.equal(one.inputs["input_ids"], again.inputs["input_ids"])
    assert one.inputs["input_ids"].tolist() != other.inputs["input_ids"].tolist()
    assert one.inputs["decoder_input_ids"][0].tolist() == [0, *one.labels[0, :-1].tolist()]


def test_seq2seq_collate_without_sentinels_asks_for_the_rest() -> None:
    batch = Seq2SeqTask(start=0).collate([sample(*range(1, 41))], [5])
    assert [*batch.inputs["input_ids"][0].tolist(), *batch.labels[0].tolist()] == list(range(1, 41))
    assert batch.num_tokens == 40


# Classification.


def test_classification_collate_and_loss() -> None:
    task = ClassificationTask(num_labels=3, padding=9)
    batch = task.collate([sample(1, 2, label=2), sample(3, label=np.int64(0))], [0, 0])
    assert batch.labels.tolist() == [2, 0]
    assert (batch.num_targets, batch.num_tokens) == (2, 3)
    logits = torch.tensor([[0.0, 0.0, 5.0], [0.0, 5.0, 0.0]])
    torch.testing.assert_close(
        task.loss(outputs(logits), batch).loss, F.cross_entropy(logits, batch.labels, reduction="sum")
    )
    hits, weight = task.metrics(outputs(logits), batch)["accuracy"]
    assert (hits.item(), weight.item()) == (1.0, 2.0)
    assert task.loss(outputs(logits), batch.weightless()).loss.item() == 0


@pytest.mark.parametrize("label", [None, 3, -1])
def test_classification_collate_of_an_unknown_label_is_refused(label: int | None) -> None:
    with pytest.raises(ConfigError, match=rf"label {label}.*3 classes"):
        ClassificationTask(num_labels=3).collate([sample(1, label=label)], [0])
