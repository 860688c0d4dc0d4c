from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from strategies.base import Batch
from strategies.errors import ConfigError
from trainer.models.hf import HFModel
from trainer.models.lora import LoRA

MakeTiny = Callable[..., HFModel]
RNG = np.random.default_rng(0)
SAMPLES = [{"tokens": RNG.integers(0, 256, size), "counts": RNG.random(size) < 0.7} for size in (20, 13, 20)]
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "opt": {"dropout": 0.0},
}


def trained(model: HFModel) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    return model.make().double().train(), model.task().collate(SAMPLES, [1, 2, 3])


def step(model: HFModel) -> tuple[Tensor, dict[str, Tensor], list[str], dict[str, Any]]:
    module, batch = trained(model)
    outputs = module(**batch.inputs)
    loss = model.task().loss(outputs, batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, list(module.state_dict()), model.task().metrics(outputs, batch)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert", "opt"])
def test_chunked_loss_has_the_plain_loss_gradients_names_and_accuracy(tiny: MakeTiny, architecture: str) -> None:
    config = NO_DROPOUT.get(architecture, {})
    loss, gradients, names, metrics = step(tiny(architecture, config=config))
    other = step(tiny(architecture, config=config, loss_chunk=7))
    torch.testing.assert_close(other[0], loss, rtol=1e-12, atol=0)
    assert other[2] == names
    assert other[1].keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(other[1][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert [float(part) for part in other[3]["accuracy"]] == [float(part) for part in metrics["accuracy"]]


def test_chunked_loss_under_autocast_has_the_plain_loss_in_fp32(tiny: MakeTiny) -> None:
    found = []
    for chunk in (0, 7):
        model = tiny("llama", loss_chunk=chunk)
        torch.manual_seed(0)
        module, batch = model.make(), model.task().collate(SAMPLES, [1, 2, 3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.task().loss(module(**batch.inputs), batch).loss
        loss.backward()
        found.append((loss.detach(), module.lm_head.weight.grad))
    assert found[1][0].dtype is torch.float32
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.05, atol=0.05)


def test_chunked_head_keeps_the_tie(tiny: MakeTiny) -> None:
    module, _ = trained(tiny("gpt2", loss_chunk=7))
    assert module.lm_head.weight is module.transformer.wte.weight


def test_chunked_loss_of_a_batch_that_became_weightless_is_zero_with_a_graph(tiny: MakeTiny) -> None:
    model = tiny("llama", loss_chunk=7)
    module, batch = trained(model)
    empty = batch.weightless()
    loss = model.task().loss(module(**empty.inputs), empty).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in module.parameters())


def test_forward_without_targets_gives_logits(tiny: MakeTiny) -> None:
    module, batch = trained(tiny("llama", loss_chunk=7))
    plain, _ = trained(tiny("llama"))
    tokens = {"input_ids": batch.inputs["input_ids"]}
    module(**batch.inputs)  # a step with targets leaves nothing behind
    assert torch.equal(module(**tokens).logits, plain(**tokens).logits)


def largest_saved(module: nn.Module, model: HFModel, batch: Batch) -> int:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.task().loss(module(**batch.inputs), batch)
    return max(sizes)


def test_chunked_loss_never_keeps_all_logits(tiny: MakeTiny) -> None:
    vocabulary = 5000
    found = {}
    for chunk in (0, 4):
        model = tiny("llama", config={"vocab_size": vocabulary}, loss_chunk=chunk)
        module, batch = trained(model)
        found[chunk] = largest_saved(module, model, batch)
    positions = math.prod(batch.labels.shape)
    assert found[0] == positions * vocabulary
    assert found[4] <= vocabulary * 32  # the head's own weight


def test_chunked_loss_works_through_adapters(tiny: MakeTiny) -> None:
    plain, _, _, _ = step(tiny("llama", lora=LoRA(rank=2)))
    chunked, gradients, _, _ = step(tiny("llama", lora=LoRA(rank=2), loss_chunk=7))
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)
    assert all("lora_" in name for name in gradients)


@pytest.mark.parametrize(("architecture", "reason"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_chunked_loss_for_a_model_that_changes_its_logits_is_refused(
    tiny: MakeTiny, architecture: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"loss_chunk.*{reason}.*model\.loss_chunk") as caught:
        tiny(architecture, loss_chunk=7)
    assert "\n" not in str(caught.value)


def test_forward_that_changes_what_the_head_gave_is_refused(tiny: MakeTiny) -> None:
    module, batch = trained(tiny("llama", loss_chunk=7))
    inner = module.forward

    def scaled(**inputs: Any) -> Any:
        outputs = inner(**inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    module.forward = scaled  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="changes its logits after the head"):
        module(**batch.inputs)
