"""The fine-tuning example: train, export, fine-tune with adapters, go on, export merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from strategies.testing import Workers
from strategies.world import Launch, World, open_store
from tests.trainer.commands.jobs import ROOT, command
from tests.trainer.jobs import TINY, fit, lines
from trainer.checkpoint import Checkpointer, Checkpoints

ANSWERS = ROOT / "docs" / "examples" / "answers.jsonl"


def run(workers: Workers, folder: Path, size: int, *overrides: str) -> dict[str, Any]:
    answers = workers.run(fit, size, str(folder), list(overrides))
    assert "error" not in answers[0], answers[0]
    return dict(answers[0])


def export(workers: Workers, source: Path, target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    [(code, _, errors)] = workers.run(command, 1, ["export", str(source), str(target)])
    assert (code, errors) == (0, ""), errors
    return AutoModelForCausalLM.from_pretrained(target).eval()


def test_answers_every_line_is_a_conversation() -> None:
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    assert len(rows) == 190
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_answers_pretrained_exported_and_fine_tuned(workers: Workers, tmp_path: Path) -> None:
    run(workers, tmp_path / "base", 1, *TINY, "trainer.max_steps=60", "optimizer.lr=2e-2")
    base = export(workers, tmp_path / "base", tmp_path / "model")
    keys = ("experiment=lora_answers", f"model.path={tmp_path / 'model'}", f"data.files=[{ANSWERS}]", "logger=[]",
            "hooks=[]", "trainer.log_every=1", "trainer.eval_every=null", "optimizer.lr=2e-2", "schedule=constant",
            "trainer.micro_batch=8")  # fmt: skip
    run(workers, tmp_path / "lora", 2, *keys, "trainer.max_steps=10")
    going_on = run(workers, tmp_path / "lora", 2, *keys, "trainer.max_steps=20")
    assert going_on["progress"]["step"] == 20
    found = lines(tmp_path / "lora")
    assert [line["step"] for line in found] == list(range(1, 21))
    assert found[-1]["loss"] < found[0]["loss"] - 0.1

    assert _stored_base(tmp_path / "lora").keys() == base.state_dict().keys()
    for name, value in _stored_base(tmp_path / "lora").items():
        assert torch.equal(value, base.state_dict()[name]), name  # adapters alone were trained

    merged = export(workers, tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    tokens = torch.tensor([list(b"What is os.path.join?")])
    with torch.no_grad():
        difference = (merged(tokens).logits - base(tokens).logits).abs().max()
    assert difference > 0.1


def _stored_base(folder: Path) -> dict[str, torch.Tensor]:
    """The weights beside the adapters in a run's newest checkpoint, by the names of the model without adapters."""
    keeper = Checkpointer(
        str(folder / "checkpoints"), World(device=torch.device("cpu"), store=open_store(Launch())), Checkpoints()
    )
    newest = keeper.newest()
    assert newest is not None
    shapes = keeper.shapes(newest)
    names = [name for name in shapes if name.startswith("weights/") and ".lora_" not in name]
    found = {name: torch.empty(shapes[name]) for name in names}
    keeper.load(newest, found)
    return {
        name.removeprefix("weights/base_model.model.").replace(".base_layer", ""): value
        for name, value in found.items()
    }
