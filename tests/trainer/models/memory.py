"""Memory that a start takes in each process, and an export, of a model of 551M parameters.

    python -m tests.trainer.models.memory [--processes 4] [--little] [--folder FOLDER] [--only start|export]

A process counts from after its imports, before it connects; another one reads its anonymous resident memory
(`RssAnon` of /proc/PID/status: mapped files don't count) every 2 ms until the model is set up. AdamW, gradients and
activations come later.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

LARGE = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 12,
         "num_key_value_heads": 12, "vocab_size": 32000, "max_position_embeddings": 512}  # fmt: skip
LITTLE = {**LARGE, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 8000}
_IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.llama.modeling_llama"),
    *("strategies.fsdp", "trainer.checkpoint.metadata", "trainer.commands.export", "trainer.models.hf"),
    *("trainer.config", "trainer.commands.trained"),
)
_WHERE_IT_IS = ("deepspeed",)  # transformers imports it where it saves a model
_MIB = 1 << 20
_PAUSE_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one process took, and what its job answered."""

    above: int
    """Bytes of anonymous memory at the highest, above the level before."""
    answer: Any


def watch(job: Callable[..., Any], size: int, *args: Any) -> list[Seen]:
    """Run `job(*args)` in `size` new processes that form a world, and watch each one's memory.

    Raises:
        RuntimeError: a process ended without an answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ends = [spawn.Pipe() for _ in range(size)]
    processes = [
        spawn.Process(target=_run, args=(theirs, rank, size, port, job, args), daemon=True)
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    try:
        mine = [end for end, _ in ends]
        for _, theirs in ends:
            theirs.close()  # so that the end of a process is the end of its pipe
        for end in mine:
            end.recv()
        before = [_anonymous(process.pid) for process in processes]
        peaks = list(before)
        for end in mine:
            end.send("go")
        waiting = set(range(size))
        while waiting:
            for rank in tuple(waiting):
                peaks[rank] = max(peaks[rank], _anonymous(processes[rank].pid))
                if mine[rank].poll():
                    waiting.discard(rank)
                elif not processes[rank].is_alive():
                    raise RuntimeError(f"rank {rank} ended with exit code {processes[rank].exitcode}")
            time.sleep(_PAUSE_S)
        for end in mine:
            end.recv()
            end.send("answer")
        answers = [end.recv() for end in mine]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    return [Seen(above=peak - level, answer=answer) for peak, level, answer in zip(peaks, before, answers, strict=True)]


def _run(end: Connection, rank: int, size: int, port: int, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    for name in _IMPORTED:
        importlib.import_module(name)
    for name in _WHERE_IT_IS:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    end.send("ready")
    end.recv()
    found = job(*args)
    end.send("done")
    end.recv()
    end.send(found() if callable(found) else found)


def _anonymous(pid: int | None) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has ended")


def model_of(fields: dict[str, Any]) -> Any:
    """A Llama with `fields` of its configuration, or from the folder `path`."""
    from trainer.models.hf import HFModel

    path = fields.get("path")
    model = HFModel(path=path) if path else HFModel(architecture="llama", config=fields)
    model.prepare(None)
    return model


def write_model(fields: dict[str, Any], folder: Path, dtype: str = "F32") -> int:
    """Write a model's folder quickly, with values that repeat; its number of parameters.

    Args:
        fields: of the configuration.
        folder: to make.
        dtype: F32 or BF16, of the file.
    """
    import torch

    model = model_of(fields)
    folder.mkdir(parents=True)
    model.save_config(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in model.make().state_dict().items()}
    number = {"F32": 4, "BF16": 2}[dtype]
    drawn = torch.rand(5_000_011, generator=torch.Generator().manual_seed(0)).sub(0.5).div(10)
    values = drawn.view(torch.int32).numpy().tobytes()
    if dtype == "BF16":
        values = drawn.bfloat16().view(torch.int16).numpy().tobytes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + number * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned, and can be mapped
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(values)):
            file.write(values[:left])
    return end // number


def start(fields: dict[str, Any], settings: dict[str, Any], whole: bool = False) -> Callable[[], dict[str, int]]:
    """Set a model up as a run does, without an optimizer that keeps anything; sizes in bytes.

    Args:
        fields: of the configuration, or `path`.
        settings: of `FSDPStrategy`.
        whole: read stored weights as before they were streamed.
    """
    import torch
    from torch.optim import SGD

    from strategies.backends import GlooBackend
    from strategies.base import Plan
    from strategies.fsdp import FSDPStrategy
    from trainer.host_memory import keep_freed_memory
    from trainer.models import pretrained

    keep_freed_memory()  # as a run does it
    strategy = FSDPStrategy(**settings)
    strategy.connect(GlooBackend())
    plan = Plan(micro_batch=1, deferred=True)
    model = model_of(fields)
    with strategy.init_context(plan):
        module = model.make()
    with mock.patch.object(pretrained, "stream", return_value=False) if whole else mock.MagicMock():
        strategy.setup(module, model.weights(0), lambda named: SGD([value for _, value in named], lr=0.1), plan)

    def sizes() -> dict[str, int]:
        def held(part: torch.nn.Module) -> int:
            return sum(value.numel() for value in part.parameters()) * 4

        blocks = [held(part) for part in strategy._cut.parts[1:]]
        mine = sum(value.to_local().numel() for value in module.parameters()) * 4  # type: ignore[operator]
        largest = max(value.numel() for value in module.parameters()) * 4
        found = {"shard": mine, "block": max(blocks), "root": held(module) - sum(blocks), "tensor": largest}
        if "path" in fields:
            from safetensors import safe_open

            with safe_open(Path(fields["path"]) / "model.safetensors", framework="pt") as file:
                rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
                for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
                    local: Any = module.get_parameter(name)
                    expected = file.get_tensor(name).float().chunk(size)[rank]
                    assert torch.equal(local.to_local(), expected), name
        strategy.close()
        return found

    return sizes


def write_checkpoint(fields: dict[str, Any], run: str) -> None:
    """Under `fsdp_full`, as a run does it; weights alone."""
    from torch.optim import SGD

    from strategies.backends import GlooBackend
    from strategies.base import Plan
    from strategies.fsdp import FSDPStrategy
    from trainer.checkpoint import Checkpointer, Checkpoints, Record

    strategy = FSDPStrategy()
    world = strategy.connect(GlooBackend())
    plan = Plan(micro_batch=1, deferred=True)
    model = model_of(fields)
    with strategy.init_context(plan):
        module = model.make()
    module, optimizer = strategy.setup(
        module, model.weights(0), lambda named: SGD([value for _, value in named], lr=0.1), plan
    )
    state = strategy.state(module, optimizer)
    record = Record(
        progress={"step": 1, "samples": 0, "tokens": 0},
        world_size=world.size,
        aliases=state.aliases,
        config={"model": {"architecture": "llama", "config": fields}},
    )
    keeper = Checkpointer(f"{run}/checkpoints", world, Checkpoints())
    keeper.save({f"weights/{name}": value for name, value in state.weights.items()}, {}, record)
    strategy.close()


def export(run: str, target: str, max_shard_size: str) -> Callable[[], dict[str, int]]:
    """What `shardwright export` does; the largest file, and their number."""
    from trainer.commands import export as command

    command.main(command.parser().read([run, target, "--max-shard-size", max_shard_size]))

    def sizes() -> dict[str, int]:
        found = [file.stat().st_size for file in Path(target).glob("*.safetensors")]
        return {"largest": max(found), "files": len(found)}

    return sizes


def generate(run: str, *words: str) -> Callable[[], int]:
    """What `shardwright generate` does; the bytes of its weights."""
    from trainer.commands import generate as command
    from trainer.commands.trained import Trained

    command.main(command.parser().read([run, "a", "--max-new-tokens", "2", "--tokenizer", "bytes", *words]))

    def size() -> int:
        trained = Trained.open(run)
        return sum(4 * math.prod(shape) for shape in trained.keeper.shapes(trained.found).values())

    return size


def exports(fields: dict[str, Any], size: int, folder: Path) -> Iterator[tuple[str, Seen]]:
    """Exports of one checkpoint in files of several sizes, and what each took."""
    watch(write_checkpoint, size, fields, str(folder / "run"))
    for limit in ("200MB", "500MB", "1GB"):
        [seen] = watch(export, 1, str(folder / "run"), str(folder / "out"), limit)
        yield limit, seen
        shutil.rmtree(folder / "out")


def rows(fields: dict[str, Any], size: int, folder: Path) -> Iterator[tuple[str, list[Seen]]]:
    """Each way of starting, and what every process took."""
    write_model(fields, folder / "fp32")
    yield "stored in fp32", watch(start, size, {"path": str(folder / "fp32")}, {})
    shutil.rmtree(folder / "fp32")
    write_model(fields, folder / "bf16", "BF16")
    yield "stored in bf16", watch(start, size, {"path": str(folder / "bf16")}, {})
    yield "stored in bf16, loaded whole by every process", watch(start, size, {"path": str(folder / "bf16")}, {}, True)
    yield "fresh", watch(start, size, fields, {})


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--little", action="store_true", help="a model of 97M parameters")
    parser.add_argument("--folder", type=Path, default=None, help="for the model's files; default: a temporary one")
    parser.add_argument("--only", choices=("start", "export"), default=None)
    options = parser.parse_args()
    fields = LITTLE if options.little else LARGE
    starts, rest = options.only != "export", options.only != "start"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if starts:
            _print_starts(fields, options.processes, Path(folder))
        if rest:
            _print_exports(fields, options.processes, Path(folder))


def _print_starts(fields: dict[str, Any], size: int, folder: Path) -> None:
    print("| start | peak (MiB) | rank's shard | largest block | (peak - shard) / block | root part |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, seen in rows(fields, size, folder):
        worst = max(seen, key=lambda each: each.above - each.answer["shard"])
        shard, block = worst.answer["shard"], worst.answer["block"]
        cells = [worst.above / _MIB, shard / _MIB, block / _MIB]
        ratio = (worst.above - shard) / block
        numbers = " | ".join(f"{cell:.1f}" for cell in cells)
        print(f"| {name} | {numbers} | {ratio:.2f} | {worst.answer['root'] / _MIB:.1f} |", flush=True)


def _print_exports(fields: dict[str, Any], size: int, folder: Path) -> None:
    print("\n| export, files of at most | peak (MiB) | largest file | files |\n| --- | ---: | ---: | ---: |")
    for limit, seen in exports(fields, size, folder):
        largest, files = seen.answer["largest"] / _MIB, seen.answer["files"]
        print(f"| {limit} | {seen.above / _MIB:.1f} | {largest:.1f} | {files} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
