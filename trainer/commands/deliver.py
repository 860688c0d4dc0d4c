"""At the end of a run, its model as a folder of its own, wherever the parts of the last checkpoint lie."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from strategies.world import World
    from trainer.job import Job

_CHUNK = 16 << 20


def deliver(target: Path, job: Job) -> None:
    """Put the run's last checkpoint into `target`, as `shardwright export` does. Collective.

    Of machines with a disk each, rank 0 gets what it lacks. A model that transformers doesn't know comes as
    `model.safetensors` with the names that it gives its weights.

    Args:
        target: a folder; files in it that have the same names are replaced.
        job: the run, at its end.

    Raises:
        ConfigError: the checkpoint can't be read, or `target` not be written; on every rank.
    """
    from strategies.errors import TrainingError

    address = job.checkpoints.folder or str(job.folder / "checkpoints")
    if "://" not in address:
        try:
            _bring_together(job.world, Path(address))
        except OSError as error:
            raise TrainingError(f"SageMaker: the last checkpoint's parts can't be brought together: {error}") from error
    with job.world.together():
        if job.world.rank == 0:
            _write(address, target)
            print(f"model: {target}", flush=True)


def _write(address: str, target: Path) -> None:
    """By way of a folder beside it, so that `target` holds whole files at any time."""
    from strategies.errors import ConfigError
    from trainer.commands.export import export
    from trainer.commands.trained import Trained

    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
            new = Path(beside, "model")
            trained = Trained.open(address)
            if trained.record.config.get("model"):
                export(trained.found.address, new)
            else:
                new.mkdir()
                _write_plain(trained, new)
            for path in new.iterdir():
                shutil.move(path, target / path.name)
    except OSError as error:
        raise ConfigError(
            f"SageMaker: the model can't be written to {target}: {error}. Make room (SM_MODEL_DIR)."
        ) from error


def _write_plain(trained: Any, folder: Path) -> None:
    """The weights by the names that the Trainer's own model gives them, and the configuration that made it."""
    import torch
    import yaml
    from safetensors.torch import save_file

    from trainer.checkpoint.metadata import IndexReader

    found = trained.found
    reader = IndexReader(found.store, f"{found.folder}/tensors")
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in entries.items() if name.startswith("weights/")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    reader.read(tensors)
    save_file({name.partition("/")[2]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(trained.record.config), sort_keys=False))


def _bring_together(world: World, folder: Path) -> None:
    """Copy to rank 0's disk what only other machines have of the newest checkpoint."""
    from trainer.checkpoint.store import FolderStore

    store = FolderStore(folder)
    sizes = store.sizes()
    listed = cast(list[dict[str, int]], world.gather(sizes))
    newest = max((name.partition("/")[0] for each in listed for name in each if name.startswith("step-")), default=None)
    owners: dict[str, int] = {}
    for rank, each in enumerate(listed):
        for name in each:
            if newest is not None and name.startswith(f"{newest}/") and name not in listed[0]:
                owners.setdefault(name, rank)
    for name in sorted(owners):
        if world.rank == owners[name]:
            _send(world, _chunks(folder / name))
        elif world.rank == 0:
            with store.create(name) as file:
                for chunk in _received(world, owners[name]):
                    file.write(chunk)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _send(world: World, chunks: Iterator[bytes]) -> None:
    """To rank 0; a size before each chunk, 0 at the end, -1 where reading fails."""
    import torch
    import torch.distributed as dist

    try:
        for chunk in chunks:
            dist.send(torch.tensor([len(chunk)]), 0, group=world.control)
            dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), 0, group=world.control)
    except OSError:
        dist.send(torch.tensor([-1]), 0, group=world.control)
        raise
    dist.send(torch.tensor([0]), 0, group=world.control)


def _received(world: World, source: int) -> Iterator[bytes]:
    import torch
    import torch.distributed as dist

    size = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.recv(size, source, group=world.control)
        if int(size) < 0:
            raise OSError(f"rank {source} couldn't read its part")
        if int(size) == 0:
            return
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, source, group=world.control)
        yield data.numpy().tobytes()
