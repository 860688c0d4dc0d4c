"""Print what the planner predicts beside what was published: the tables of docs/planner-accuracy.md.

    python -m tests.trainer.planner.accuracy [words that a row's model or device holds]

About three seconds a row. A row is only written as the keys of `shardwright plan`, and nothing here changes what that
predicts. The second table is where the factor `in_step` comes from.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from strategies.precision import Numbers
from trainer.planner.efficiency import efficiency_of

REFERENCES = Path(__file__).with_name("references")

_GIB = 2**30
_LLAMA = {  # model of a row -> layers, width, hidden width, heads, key and value heads, vocabulary
    "Llama": (32, 4096, 11008, 32, 32, 32000),  # 7B gives the MFU that is printed
    "Llama 2 7B": (32, 4096, 11008, 32, 32, 32000),
    "Llama 2 13B": (40, 5120, 13824, 40, 40, 32000),
    "Llama 2 34B": (48, 8192, 22016, 64, 8, 32000),
    "Llama 2 70B": (80, 8192, 28672, 64, 8, 32000),
    "Llama 3 8B": (32, 4096, 14336, 32, 8, 128256),
    "Llama 3.1 8B": (32, 4096, 14336, 32, 8, 128256),
    "Llama 3 70B": (80, 8192, 28672, 64, 8, 128256),
}
_MPT = {  # layers, width, heads: llm-foundry's yamls of these sizes
    "MPT 125m": (12, 768, 12),
    "MPT 350m": (24, 1024, 16),
    "MPT 760m": (24, 1536, 12),
    "MPT 1b": (24, 2048, 16),
    "MPT 3b": (32, 2560, 20),
    "MPT 7b": (32, 4096, 32),
    "MPT 13b": (40, 5120, 40),
    "MPT 30b": (48, 7168, 56),
    "MPT 70b": (80, 8192, 64),
}
_H100 = ["cluster.device='H100 80GB HBM3'", "cluster.link_gb_per_s=450"]
_A100_40 = ["cluster.device=A100-SXM4-40GB", "cluster.link_gb_per_s=300"]
_A100 = ["cluster.device=A100-SXM4-80GB", "cluster.link_gb_per_s=300"]
_HBM2E = [
    "cluster.device=H100", "cluster.memory_gib=95.04", "cluster.memory_gb_per_s=2400", "cluster.power_w=500",
    "cluster.link_gb_per_s=450", "cluster.network_gbps=3200",
]  # fmt: skip
_DEVICES = {
    "H100 96GB HBM2e 500W": _HBM2E,
    "H100 95.04 GiB": _HBM2E,  # the same team's
    "H100 80GB": [*_H100, "cluster.network_gbps=3200"],  # their network isn't printed: the usual card per device
    "H100, 800 Gb/s per node": [*_H100, "cluster.network_gbps=800"],
    "A100 80GB": [*_A100, "cluster.network_gbps=1600"],  # not printed either
    "A100 80GB, 1600 Gb/s RoCE": [*_A100, "cluster.network_gbps=1600"],
    "A100 80GB, 2 Tb/s RoCE": [*_A100, "cluster.network_gbps=2000"],
    "A100 80GB, 400 Gb/s per node": [*_A100, "cluster.network_gbps=400"],
    "A100 40GB, 1600 Gb/s RoCE": [*_A100_40, "cluster.network_gbps=1600"],
}
PAPER = ("cluster=custom", "cluster.devices=8", *_DEVICES["A100 80GB, 2 Tb/s RoCE"], "data.length=512")
"""The machines of the FSDP paper (arXiv 2304.11277, section 5), and its sequence length."""
_CHECKPOINTING = {
    "no": ["none"],
    "none": ["none"],
    "yes": ["full"],
    "full": ["full"],
    "selective": ["selective", "trainer.activation_checkpointing_products_every=2"],
    "selective op": ["selective", "trainer.activation_checkpointing_products_every=2"],
    "selective layer": ["full", "trainer.activation_checkpointing_every=2"],
}


@dataclass(frozen=True)
class Row:
    """A published run."""

    name: str
    gpus: int
    device: str
    setting: str
    keys: tuple[str, ...]
    tokens_per_s: float | None
    """Per GPU."""
    memory_gib: float | None
    """Reserved by torch's allocator."""
    source: str

    @property
    def chip(self) -> str:
        """Without its memory and links."""
        return self.device[:4]

    @property
    def publisher(self) -> str:
        """Whose program that was; empty: predictions of it are promised, so nothing is fitted to it."""
        return next(name for name, words in _PUBLISHERS.items() if words in self.source)


_PUBLISHERS = {
    "": "llama3_h100_202412",
    "llm-foundry": "llm-foundry",
    "torchtitan's first FSDP2": "torchtitan pull request",
    "PyTorch's blog": "pytorch.org",
    "torchtitan, A100": "torchtitan",
}
_HIDDEN = 0.05
"""Of a step at most what waits for others, or it says nothing about computing."""


def rows() -> Iterator[Row]:
    """Those that the planner can say something of: 16 bits, sharded data parallel, and all that must be known is."""
    for name in ("torchtitan.csv", "other_runs.csv"):
        with (REFERENCES / name).open(newline="") as file:
            for line in csv.DictReader(file):
                if (row := _row(line)) is not None:
                    yield row


def _row(line: dict[str, str]) -> Row | None:
    strategy = {"fsdp": "fsdp_full", "fsdp full": "fsdp_full", "fsdp hybrid": "fsdp_hybrid"}.get(
        line.get("strategy") or line.get("parallelism") or ""
    )
    numbers = line.get("numbers") or line.get("precision")
    checkpointing = _CHECKPOINTING.get(line["activation_checkpointing"])
    known = strategy and numbers == "bf16" and checkpointing and line["gpus"] and line["device"] in _DEVICES
    if not known or line["model"] not in {**_LLAMA, **_MPT}:
        return None
    ibm = "per node" in line["device"]
    if ibm and checkpointing[0] == "selective":
        return None  # which blocks that was isn't printed
    # torchtitan's default of these models where a table doesn't print it: docs/performance.md there.
    length = int(line["sequence"] or (4096 if "Llama 2" in line["model"] else 8192))
    batch, accumulation = int(line.get("local_batch") or line["micro_batch"]), int(line.get("accumulation") or 1)
    gpus = int(line["gpus"])
    compiled = line["compile"] == "yes"
    keys = (
        "--cast", f"strategy={strategy}", "precision=bf16", *_model(line["model"], length), f"data.length={length}",
        f"trainer.micro_batch={batch}", f"trainer.global_batch={batch * accumulation * gpus}",
        f"trainer.activation_checkpointing={checkpointing[0]}", *checkpointing[1:],
        "cluster=custom", "cluster.devices=8", *_DEVICES[line["device"]], f"cluster.nodes={gpus // 8}",
        *(["strategy.shard_size=8"] if strategy == "fsdp_hybrid" else []),
        *(["compile=true"] if compiled else []),
    )  # fmt: skip
    setting = f"{batch}{f' x {accumulation}' if accumulation > 1 else ''} x {length}"
    return Row(
        line["model"],
        gpus,
        line["device"],
        f"{setting}, {line['activation_checkpointing']}{', compile' if compiled else ''}",
        keys,
        float(line["tokens_per_s_per_gpu"]) if line["tokens_per_s_per_gpu"] else None,
        float(line["memory_gib"]) if line.get("memory_gib") else None,
        line["source"],
    )


def _model(name: str, length: int) -> list[str]:
    if name in _LLAMA:
        layers, width, hidden, heads, kv_heads, vocabulary = _LLAMA[name]
        config = (
            f"vocab_size: {vocabulary}, hidden_size: {width}, intermediate_size: {hidden}, "
            f"num_hidden_layers: {layers}, num_attention_heads: {heads}, num_key_value_heads: {kv_heads}, "
            f"max_position_embeddings: {length}"
        )
        return ["model=hf", "model.architecture=llama", f"model.config={{{config}}}"]
    layers, width, heads = _MPT[name]  # GPT-2 with learned positions, as MPT's default, and without dropout
    config = (
        f"vocab_size: 50368, n_embd: {width}, n_layer: {layers}, n_head: {heads}, n_positions: {length}, "
        "activation_function: gelu, attn_pdrop: 0.0, resid_pdrop: 0.0, embd_pdrop: 0.0"
    )
    return ["model=hf", "model.architecture=gpt2", f"model.config={{{config}}}"]


def planned(keys: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """`plan.json` of `shardwright plan` with these arguments, in this process."""
    from trainer.cli import main

    with tempfile.TemporaryDirectory() as folder:
        said = StringIO()
        try:
            with redirect_stdout(said):
                main(["plan", *keys, f"run.dir={folder}"])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"shardwright plan {' '.join(keys)}: exit code {end.code}") from end
        found: dict[str, Any] = json.loads((Path(folder) / "plan.json").read_text())
    return found


def main(words: list[str]) -> None:
    """Print two tables in Markdown."""
    reached: dict[tuple[str, str], list[float]] = defaultdict(list)
    print("| model | GPUs | device | batch x length, recomputed | tokens/s per GPU | predicted | | GiB | predicted | |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows():
        if not all(word in f"{row.name} {row.device} {row.setting}" for word in words):
            continue
        [found] = planned(row.keys)["candidates"]
        cells = [row.name, str(row.gpus), row.device, row.setting]
        speed, memory = found["speed"]["tokens_per_s_per_device"], found["bytes_per_rank"]["total"] / _GIB
        cells += _compared(row.tokens_per_s, speed, ",.0f") + _compared(row.memory_gib, memory, ".1f")
        print(f"| {' | '.join(cells)} |", flush=True)
        if row.publisher and (share := in_step(row, found["speed"])) is not None:
            reached[row.chip, row.publisher].append(share)
    print("\n| chip | whose | rows | in_step, median | from | to |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for (chip, whose), each in sorted(reached.items()):
        print(f"| {chip} | {whose} | {len(each)} | {statistics.median(each):.3f} | {min(each):.3f} | {max(each):.3f} |")
    for chip in sorted({chip for chip, _ in reached}):
        medians = [statistics.median(each) for (name, _), each in reached.items() if name == chip]
        print(f"\n{chip}: {statistics.geometric_mean(medians):.3f}, the mean of these medians")


def in_step(row: Row, speed: dict[str, Any]) -> float | None:
    """The factor with which this row's step would take as long as was published; None: too much of it waits."""
    if row.tokens_per_s is None or speed["exposed_s"] > _HIDDEN * speed["step_s"]:
        return None
    published_s = speed["step_s"] * speed["tokens_per_s_per_device"] / row.tokens_per_s
    factors = efficiency_of(row.device, Numbers.bf16)
    beside_s = (speed["communication_s"] - speed["exposed_s"]) * (factors.overlap - 1)
    computing_s = published_s - speed["optimizer_s"] - speed["exposed_s"] - beside_s
    return float(factors.in_step * (speed["compute_s"] - beside_s) / computing_s)


def _compared(published: float | None, predicted: float, form: str) -> list[str]:
    if published is None:
        return ["", format(predicted, form), ""]
    return [format(published, form), format(predicted, form), f"{predicted / published - 1:+.0%}"]


if __name__ == "__main__":
    main(sys.argv[1:])
