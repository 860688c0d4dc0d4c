"""The model card of an exported model: what it is, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint import Record

_PIPELINES = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "text2text-generation",
    "classification": "text-classification",
    "image_classification": "image-classification",
}


def card(record: Record, module: Any, kind: str) -> str:
    """Markdown with the front matter that the hub reads. Names no path of this machine.

    Args:
        record: of the exported checkpoint.
        module: the exported model; may be without storage.
        kind: `weights`, or `average` for the running average.
    """
    import torch
    import transformers

    from trainer.models.objectives import Objective, auto_class

    model = record.config["model"]
    objective, base = str(model.get("objective")), model.get("path")
    known = objective in Objective.__members__
    made_by = auto_class(Objective[objective]).__name__ if known else "AutoModel"
    kind_of_input = "image_processor" if known and Objective[objective].reads_images else "tokenizer"
    reader = "AutoImageProcessor" if kind_of_input == "image_processor" else "AutoTokenizer"
    on_hub = bool(base) and not Path(base).expanduser().is_absolute() and not Path(base).exists()
    front = {
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES.get(objective),
        "base_model": base if on_hub else None,
    }
    front_lines = [f"{key}: {value}" for key, value in front.items() if value]
    number = sum(value.numel() for value in module.parameters())
    rows = {**_training(record), "averaged": "running average of the weights" if kind == "average" else None}
    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(
        [
            "---",
            *front_lines,
            "tags:",
            f"- {module.config.model_type}",
            "- shardwright",
            "---",
            "",
            f"# {_title(record)}",
            "",
            f"A `{type(module).__name__}` of {number:,} parameters, trained with Shardwright.",
            "",
            "## Use",
            "",
            "```python",
            f"from transformers import {reader}, {made_by}",
            "",
            f'model = {made_by}.from_pretrained("<this folder>")',
            f'{kind_of_input} = {reader}.from_pretrained("<this folder>")',
            "```",
            "",
            "## Training",
            "",
            "| | |",
            "| --- | --- |",
            *table,
            f"| versions | torch {torch.__version__}, transformers {transformers.__version__} |",
            "",
        ]
    )


def _title(record: Record) -> str:
    run = record.config.get("run") or {}
    return str(run.get("name") or Path(str(run.get("dir") or "model")).name)


def _training(record: Record) -> dict[str, Any]:
    """What a reader wants to know of it, so far as the checkpoint says it."""
    config, progress, metrics = record.config, record.progress, record.metrics

    def of(group: str, key: str) -> Any:
        found = config.get(group)
        return found.get(key) if isinstance(found, Mapping) else None

    base, lora = of("model", "path"), (of("model", "lora") or {}).get("rank")
    results = {name: value for name, value in metrics.items() if name == "loss" or name.startswith("val_")}
    return {
        "started from": Path(base).name if base else "fresh weights",
        "adapters": f"LoRA of rank {lora}, merged" if lora else None,
        "steps": f"{int(progress['step']):,}",
        "samples": f"{int(progress['samples']):,}",
        "tokens": f"{int(progress['tokens']):,}",
        "tokenizer": Path(name).name if (name := of("data", "tokenizer")) else None,
        "length of a sample": of("data", "length"),
        "global batch": of("trainer", "global_batch"),
        "learning rate": of("optimizer", "lr"),
        "precision": of("precision", "numbers"),
        "processes": record.world_size,
        "seed": config.get("seed"),
        **{f"{name} (at the last step)": f"{value:.4g}" for name, value in sorted(results.items())},
    }
