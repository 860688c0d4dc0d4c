"""Each experiment trains, goes on under another strategy with other ranks, and is exported, through the commands.

Here every experiment makes one move. `SHARDWRIGHT_EXPERIMENTS=all python -m pytest tests/test_experiments.py` makes
each under every strategy, and writes what it found to `runs/experiments.md`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from strategies.blocks import find_blocks, with_own_parameters
from strategies.testing import Workers
from tests.starts import start
from tests.trainer.commands.jobs import ROOT, command
from tests.trainer.data.helpers import build
from tests.trainer.jobs import losses
from trainer.commands.parts import tokenizer_of
from trainer.complaints import CONF
from trainer.config import CHOOSERS, compose, made, strategy_names
from trainer.data import evaluation_batches
from trainer.models.objectives import auto_class

ALL = os.environ.get("SHARDWRIGHT_EXPERIMENTS") == "all"
STEPS, MOVED_AT = 6, 3
MOST_APART = 5e-6

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SMALL = [name for name in EXPERIMENTS if not name.endswith("_gpu")]
LARGE = [name for name in EXPERIMENTS if name.endswith("_gpu")]

RANKS = {"single": 1, "ddp": 2, "accelerate": 2, "fsdp_full": 2, "fsdp_grad_op": 2, "fsdp_hybrid": 4,
         "fsdp_replicate": 2, "mics": 4, "horovod": 2, "zero1": 2, "zero2": 2, "zero3": 2, "zero3_offload": 2,
         "zero_infinity": 2, "zero_hpz": 4}  # fmt: skip
WORDS = {"fsdp_hybrid": ["strategy.replicas=2"], "mics": ["strategy.sharded_data_parallel_degree=2"],
         "zero_hpz": ["strategy.hpz_size=2"]}  # fmt: skip
"""Two groups of two."""
SAMPLE = {"cpu_ddp": ("ddp", "zero2"), "fsdp_llama": ("fsdp_full", "zero3"), "fsdp_t5": ("fsdp_grad_op", "horovod"),
          "mlm_bert": ("fsdp_replicate", "accelerate"), "mlm_esm": ("single", "mics"),
          "vit_images": ("zero_hpz", "fsdp_hybrid"), "lora_answers": ("zero1", "zero_infinity")}  # fmt: skip
ALIKE_MOVED = {"zero3_offload"}  # goes the way of zero_infinity
STRATEGIES = list(RANKS)
EVERY = [(name, *move) for name in SMALL for move in zip(STRATEGIES, [*STRATEGIES[1:], STRATEGIES[0]], strict=True)]
MOVES = EVERY if ALL else [(name, *SAMPLE[name]) for name in SMALL]

LIBRARIES = {"zero": "deepspeed", "horovod": "horovod"}
LAYERS = ("model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=2",
          "model.config.num_attention_heads=2")  # fmt: skip
TEXT = ("data=text", f"data.paths=[{ROOT / 'strategies' / 'base.py'}]", "data.length=16")
TINY = {
    "cpu_ddp": [*LAYERS, "model.config.num_key_value_heads=2", *TEXT],
    "fsdp_llama": [*LAYERS, "model.config.num_key_value_heads=2", *TEXT],
    "fsdp_t5": ["model.config.d_model=16", "model.config.d_kv=8", "model.config.d_ff=32", "model.config.num_layers=2",
                "model.config.num_heads=2", *TEXT, "data.length=32"],
    "mlm_bert": [*LAYERS, *TEXT],
    "mlm_esm": [*LAYERS, "data.length=64"],
    "vit_images": [*LAYERS, "data.validation=0.02"],
    "lora_answers": ["model.path={base}", f"data.files=[{ROOT / 'docs' / 'examples' / 'answers.jsonl'}]",
                     "data.length=32"],
}  # fmt: skip
"""As small as it gets, on data of the experiment's own kind."""
ALIKE = ("trainer.global_batch=4", "trainer.micro_batch=1", "trainer.log_every=1", "trainer.eval_every=null",
         "schedule=constant", "optimizer.lr=1e-3", "hooks=[]", "logger=[]", "checkpoint.every=null")  # fmt: skip


class Bench:
    """Runs experiments at their tiny sizes in one folder, and remembers what several moves need."""

    def __init__(self, workers: Workers, folder: Path) -> None:
        self.workers, self.folder = workers, folder
        self.rows: list[str] = []
        self._unmoved: dict[str, list[float]] = {}

    def words(self, name: str) -> list[str]:
        if "{base}" in TINY[name][0] and not (self.folder / "base").exists():
            self.train(self.folder / "pretrained", "fsdp_llama", "single", STEPS)
            self.export(self.folder / "pretrained", self.folder / "base")
        sizes = [word.replace("{base}", str(self.folder / "base")) for word in TINY[name]]
        return [f"experiment={name}", *sizes, *ALIKE, f"cache={self.folder / 'cache'}"]

    def train(self, run: Path, name: str, strategy: str, steps: int) -> None:
        words = [*self.words(name), f"strategy={strategy}", *WORDS.get(strategy, [])]
        where = [f"run.dir={run}", f"trainer.max_steps={steps}"]
        for found in self.workers.run(start, RANKS[strategy], [*words, *where]):
            assert found.code == 0, found.err

    def unmoved(self, name: str) -> list[float]:
        """The losses of an experiment in one process without a stop."""
        if name not in self._unmoved:
            self.train(self.folder / name, name, "single", STEPS)
            self._unmoved[name] = losses(self.folder / name)
        return self._unmoved[name]

    def export(self, run: Path, target: Path) -> None:
        [(code, _, errors)] = self.workers.run(command, 1, ["export", str(run), str(target)])
        assert (code, errors) == (0, ""), errors

    def held_out_loss(self, name: str, exported: Path) -> float:
        """Of what transformers opens at `exported`, over the samples that the experiment holds out."""
        config = compose(self.words(name))
        data = build(made(config.data), self.folder / "cache")
        assert data.validation is not None
        model = made(config.model)
        model.prepare(data.tokenizer)
        task, module = model.task(), auto_class(model.objective).from_pretrained(exported).eval()
        total, targets = 0.0, 0
        for batch in evaluation_batches(data.validation, task.collate, micro_batch=1, seed=config.seed):
            with torch.no_grad():
                total += task.loss(module(**batch.inputs), batch).loss.item()
            targets += batch.num_targets
        return total / targets


@pytest.fixture(scope="module")
def bench(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    found = Bench(workers, tmp_path_factory.mktemp("bench"))
    yield found
    if ALL:
        head = ["| experiment | from | to | largest difference of a loss | of the exported model's held-out loss |",
                "|---|---|---|---|---|"]  # fmt: skip
        target = ROOT / "runs" / "experiments.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join([*head, *found.rows]) + "\n")


def test_every_experiment_and_strategy_is_moved_here() -> None:
    assert sorted(TINY) == SMALL
    assert set(strategy_names()) >= set(RANKS) == {name for move in SAMPLE.values() for name in move} | ALIKE_MOVED
    here = {path.stem for path in CONF.glob("strategy/*.yaml")} - CHOOSERS - {"horovod_elastic"}  # refused here
    assert here == set(RANKS)
    assert {f"{name}_gpu" for name in SMALL if name != "lora_answers"} == set(LARGE)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "first", "second"), MOVES)
def test_experiment_goes_on_elsewhere_and_is_exported(
    bench: Bench, tmp_path: Path, name: str, first: str, second: str
) -> None:
    for strategy in (first, second):
        if library := LIBRARIES.get(strategy.partition("_")[0].rstrip("123")):
            pytest.importorskip(library)
    expected = bench.unmoved(name)
    assert min(expected) < expected[0] - 0.01
    bench.train(tmp_path / "run", name, first, MOVED_AT)
    bench.train(tmp_path / "run", name, second, STEPS)
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == STEPS
    apart = max(abs(mine - other) for mine, other in zip(found, expected, strict=True))
    assert apart <= MOST_APART, (found, expected)
    bench.export(tmp_path / "run", tmp_path / "out")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    exported = abs(bench.held_out_loss(name, tmp_path / "out") - summary["final_val_loss"])
    assert exported <= MOST_APART
    places = [f"{strategy} x {RANKS[strategy]}" for strategy in (first, second)]
    bench.rows.append("| " + " | ".join([name, *places, f"{apart:.1e}", f"{exported:.1e}"]) + " |")


BLOCKS = {"cpu_ddp_gpu": {"LlamaDecoderLayer": 8}, "fsdp_llama_gpu": {"LlamaDecoderLayer": 20},
          "fsdp_t5_gpu": {"T5Block": 40}, "mlm_bert_gpu": {"BertLayer": 24}, "mlm_esm_gpu": {"EsmLayer": 33},
          "vit_images_gpu": {"ViTLayer": 24, "ViTEmbeddings": 1}}  # fmt: skip
"""What is gathered one at a time; embeddings tied to the head are gathered with the rest."""
GIVEN = {"mlm_esm_gpu": ["data.files=[x.fasta]"], "vit_images_gpu": ["data.path=x"]}


@pytest.mark.parametrize("name", LARGE)
def test_large_size_is_built_without_storage_and_planned(bench: Bench, tmp_path: Path, name: str) -> None:
    words = [f"experiment={name}", *GIVEN.get(name, [])]
    config = compose(words)
    assert (config.precision.numbers.name, config.compile) == ("bf16", True)
    model = made(config.model)
    model.prepare(tokenizer_of(config.data))
    assert model.positions is None or model.positions >= config.data.get("length", 0)
    with torch.device("meta"):
        module = model.make()
    assert Counter(type(block).__name__ for block in with_own_parameters(module, find_blocks(module))) == BLOCKS[name]

    plan = ["plan", "--ranks", "8", *words, f"run.dir={tmp_path}"]
    [(code, out, errors)] = bench.workers.run(command, 1, plan)
    assert (code, errors) == (0, ""), errors
    assert "fsdp_full" in out
    predicted = json.loads((tmp_path / "plan.json").read_text())
    assert predicted["num_parameters"] == sum(value.numel() for value in module.parameters())
    held = {row["strategy"]: row["bytes_per_rank"] for row in predicted["candidates"]}
    assert held["fsdp_full"]["weights"] == pytest.approx(held["ddp"]["weights"] / 8, rel=0.01)
