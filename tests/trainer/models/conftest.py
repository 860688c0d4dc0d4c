"""Tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer.data.tokenizers import ByteTokenizer
from trainer.models.hf import HFModel, Objective

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "mixtral": {**_SMALL, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": _SMALL,
    "opt": _OPT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "bert": {**_SMALL, "max_position_embeddings": 64},
    "roberta": {**_SMALL, "max_position_embeddings": 300},
    "esm": {
        **_SMALL,
        "max_position_embeddings": 64,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "mask_token_id": 258,
    },
    "vit": {**_SMALL, "image_size": 8, "patch_size": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "gemma2": {**_SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "cohere": {**_SMALL, "num_key_value_heads": 2},
}
_OBJECTIVES = {"bert": Objective.masked, "roberta": Objective.masked, "esm": Objective.masked,
               "t5": Objective.seq2seq, "vit": Objective.image_classification}  # fmt: skip

MakeTiny = Callable[..., HFModel]


@pytest.fixture(scope="session")
def tiny() -> MakeTiny:
    """`tiny(architecture, config={more fields}, **fields of HFModel)`, prepared for bytes."""

    def make(architecture: str, config: dict[str, Any] | None = None, **fields: Any) -> HFModel:
        fields.setdefault("objective", _OBJECTIVES.get(architecture, Objective.causal))
        if fields["objective"] is Objective.image_classification:
            fields.setdefault("num_labels", 3)
        model = HFModel(architecture=architecture, config={**CONFIGS[architecture], **(config or {})}, **fields)
        model.prepare(ByteTokenizer())
        return model

    return make
