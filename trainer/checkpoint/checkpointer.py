"""Write and read checkpoints: tensors by torch.distributed.checkpoint, everything else as JSON.

    step-00001000/
        manifest.json       size and SHA-256 of every file; published last, makes the checkpoint real
        <attempt>/
            state.json      progress, scaler, hooks, aliases, the configuration
            tensors/        weights/<name>, optim/<name>/<slot>, average/<name>, local/<rank>/<name>

Each rank writes, hashes and syncs its own files. Nothing is renamed and no disk needs to be shared.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strategies.errors import ConfigError, TrainingError
from strategies.world import World
from trainer.checkpoint.catalogue import Catalogue, Found
from trainer.checkpoint.config import Checkpoints, Record
from trainer.checkpoint.manifest import NAME, Manifest, folder_of

if TYPE_CHECKING:
    from trainer.checkpoint.metadata import StoreWriter  # imports torch.distributed.checkpoint: half a second

_FAREWELL_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that became complete."""

    step: int
    seconds: float
    """From the call until it was complete."""
    stall_s: float
    """Of these, what the loop waited."""
    num_bytes: int
    """Of all its files."""


@dataclass(kw_only=True)
class _Pending:
    """A save under way."""

    step: int
    state: bytes
    metrics: dict[str, float]
    begin: float
    stall_s: float | None = None
    """None: the loop waits for all of it."""
    attempt: str = ""
    settled: bool = False
    """It may be complete, or become so without this rank: its files stay, whatever happens here."""

    @property
    def folder(self) -> str:
        return f"{folder_of(self.step)}/{self.attempt}"


class Checkpointer:
    """The one writer and reader below `address`. Every method is collective unless it says otherwise.

    All its messages go over the group for checkpoints, so that a save may go on in a thread of its own while
    the loop uses the others.

    Args:
        address: a folder, or what fsspec knows.
        world: the ranks.
        config: when, where, how many.
        warn: hears of damaged checkpoints that were passed over.
        write: make sure now that checkpoints can be written there.

    Raises:
        ConfigError: they can't.
    """

    def __init__(
        self,
        address: str,
        world: World,
        config: Checkpoints,
        warn: Callable[[str], None] = lambda text: None,
        *,
        write: bool = True,
    ) -> None:
        self._world = replace(world, control=world.checkpoint)
        self._config = config
        self._found = Catalogue(address, self._world, config, warn, write=write)
        # Torch remarks that a lone process writes alone. Not around each call, since these come from a thread.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._unswept: Manifest | None = None

    @property
    def address(self) -> str:
        """Where the checkpoints lie."""
        return self._found.store.address

    @property
    def staged_bytes(self) -> int:
        """Host memory of this rank that the copies for asynchronous saves take; not collective."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    def newest(self) -> Found | None:
        """The newest checkpoint that is complete and whole, past damaged ones; None: there never was one.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        self.wait()
        return self._found.newest()

    def newest_step(self) -> int | None:
        """Of the newest that claims to be complete, its files unread."""
        self.wait()
        return max((manifest.step for manifest in self._found.complete()), default=None)

    def at(self, step: int) -> Found:
        """The checkpoint of `step`.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        self.wait()
        return self._found.at(step)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """With `async_save`: get the memory for copies of this rank's part in the background; not collective.

        The first save would wait for it otherwise, several times longer than for the copying.
        """
        if self._config.async_save and self._thread is None:
            self._thread = threading.Thread(target=self._allocate, args=(self._share(tensors),), daemon=True)
            self._thread.start()

    def save(self, tensors: Mapping[str, Tensor], local: Mapping[str, Tensor], record: Record) -> None:
        """Write a checkpoint; with `async_save`, copy what it needs and let a thread write it.

        Args:
            tensors: the same names on every rank; a plain tensor has the same values everywhere, and some
                rank writes it; of a sharded one each rank writes its shard.
            local: this rank's own; names that no other rank has.
            record: the rest; equal on every rank.

        Raises:
            TrainingError: this save, or the one before, failed on some rank (disk full, no permission); on
                every rank. Earlier checkpoints are as they were.
        """
        self.wait()
        begin = time.perf_counter()
        mine = self._share(tensors) | dict(local)
        pending = _Pending(
            step=int(record.progress["step"]),
            state=json.dumps(asdict(record), indent=1).encode(),
            metrics=record.metrics,
            begin=begin,
        )
        if not self._config.async_save:
            self._complete(mine, pending)
            self.wait()
            return
        copies = self._stage(mine)
        pending.stall_s = time.perf_counter() - begin
        self._thread = threading.Thread(target=self._complete, args=(copies, pending), name="checkpoint", daemon=True)
        self._thread.start()

    def finished(self) -> Saved | None:
        """The save that ended since the last call, if it ended well; not collective, and doesn't wait.

        One that failed is reported by the next `save` or `wait`, on every rank at once.
        """
        if not isinstance(self._outcome, Saved) or (self._thread is not None and self._thread.is_alive()):
            return None
        found, self._outcome = self._outcome, None
        return found

    def wait(self) -> None:
        """Let a save that is under way come to its end.

        Raises:
            TrainingError: it failed; on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if isinstance(self._outcome, BaseException):
            error, self._outcome = self._outcome, None
            raise error

    def tidy(self) -> None:
        """At the end of a run that wrote no checkpoint: the removal that a kill may have cut short."""
        if self._unswept is not None:
            self._sweep(self._unswept)

    def close(self) -> None:
        """On the way out, perhaps after an error: give a save that is under way the time to end; not collective."""
        if self._thread is not None:
            self._thread.join(_FAREWELL_S)
        self._copies = {}

    def read_record(self, found: Found) -> Record:
        """The JSON part of a checkpoint; not collective.

        Raises:
            ConfigError: it can't be read.
        """
        try:
            return Record(**json.loads(found.store.read(f"{found.folder}/state.json")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"Checkpoint: {found.address} is not a complete checkpoint: {_first_line(error)}. "
                "Remove that folder to go on from the one before, or name another (resume)."
            ) from error

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Read into `tensors`, in place.

        Raises:
            ConfigError: a name is missing, or has another shape; the index is damaged.
        """
        from trainer.checkpoint.metadata import IndexReader

        reader = IndexReader(found.store, f"{found.folder}/tensors")
        with self._world.together():
            _check(found.address, tensors, reader)
            try:
                reader.read(tensors)
            except Exception as error:
                raise ConfigError(
                    f"Checkpoint: {found.address} is damaged: {_first_line(error)}. Remove its folder, or name "
                    "another (resume)."
                ) from error
        self._unswept = found.manifest if found.store is self._found.store else None

    def shapes(self, found: Found) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor of a checkpoint; not collective."""
        from trainer.checkpoint.metadata import IndexReader

        stored = IndexReader(found.store, f"{found.folder}/tensors").read_metadata().state_dict_metadata
        return {name: tuple(getattr(entry, "size", ())) for name, entry in sorted(stored.items())}

    # The phases of a save.

    def _share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes: its shards, and of what all ranks have alike a part of about equal size."""
        mine = {name: value for name, value in tensors.items() if _writes_shard(value)}
        whole = {name: value.numel() * value.element_size() for name, value in tensors.items() if not _sharded(value)}
        loads = [(0, rank) for rank in range(self._world.size)]
        for name in sorted(whole, key=lambda name: (-whole[name], name)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + whole[name], rank))
            if rank == self._world.rank:
                mine[name] = tensors[name]
        return mine

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory that are used again and again; the loop waits for them."""
        self._allocate(tensors)
        on_device = self._world.device.type != "cpu"
        for name, value in tensors.items():
            self._copies[name].copy_(value, non_blocking=on_device)
        if on_device:
            torch.accelerator.synchronize()
        return {name: self._copies[name] for name in tensors}

    def _allocate(self, tensors: Mapping[str, Tensor]) -> None:
        pin = self._world.device.type == "cuda"
        for name, value in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                self._copies[name] = torch.empty_like(value, device="cpu", pin_memory=pin and not _sharded(value))
                self._copies[name].zero_()  # the system hands out memory when it is first written to

    def _complete(self, tensors: dict[str, Tensor], pending: _Pending) -> None:
        """Write, publish, sweep; the outcome is for `wait` and `finished`."""
        try:
            pending.attempt = self._world.broadcast(secrets.token_hex(4))
            writer = self._write(tensors, pending)
            manifest = self._publish(pending, writer)
            self._sweep(manifest)
        except Exception as error:
            self._discard(pending)
            self._outcome = self._explained(error, pending)
            return
        seconds = time.perf_counter() - pending.begin
        stall_s = seconds if pending.stall_s is None else pending.stall_s
        self._outcome = Saved(step=pending.step, seconds=seconds, stall_s=stall_s, num_bytes=manifest.size)

    def _write(self, tensors: dict[str, Tensor], pending: _Pending) -> StoreWriter:
        """This rank's tensors, durable."""
        from trainer.checkpoint.metadata import StoreWriter

        writer = StoreWriter(self._found.store, f"{pending.folder}/tensors", self._world.rank)
        with self._world.together():
            writer.write(tensors)
        return writer

    def _publish(self, pending: _Pending, writer: StoreWriter) -> Manifest:
        """Make it real, now that every rank's files are durable."""
        from trainer.checkpoint.metadata import index_of

        step, store = folder_of(pending.step), self._found.store
        pending.settled = self._world.rank != 0
        parts = self._world.collect([writer.index, writer.written])
        files: dict[str, tuple[int, str]] = {}
        with self._world.together():
            if parts is not None:
                for _, written in parts:
                    files |= {name: (int(size), str(digest)) for name, (size, digest) in written.items()}
                index = index_of(part for part, _ in parts)
                for name, data in (("tensors/.metadata", index), ("state.json", pending.state)):
                    with store.create(f"{pending.folder}/{name}") as file:
                        file.write(data)
                    files[f"{pending.folder}/{name}"] = (file.size, file.hexdigest())
        manifest = Manifest(
            step=pending.step,
            attempt=pending.attempt,
            saved_at=time.time(),
            files={name.removeprefix(f"{step}/"): entry for name, entry in sorted(files.items())},
            metrics=pending.metrics,
        )
        with self._world.together():
            if self._world.rank == 0:
                pending.settled = True
                store.publish(f"{step}/{NAME}", manifest.to_bytes())
        return manifest

    def _sweep(self, newest: Manifest) -> None:
        """Remove what retention doesn't keep. A failure here loses nothing, and is tried again next time."""
        with contextlib.suppress(OSError, ConfigError):
            self._found.sweep(newest)
        self._unswept = None

    def _discard(self, pending: _Pending) -> None:
        """What a failed save left of this rank's; a full disk has better use for the space.

        What stays where it can't be known is for a later sweep.
        """
        if pending.attempt and not pending.settled and self._found.leads:
            with contextlib.suppress(OSError):
                self._found.store.remove(self._found.store.sizes(pending.folder))

    def _explained(self, error: BaseException, pending: _Pending) -> BaseException:
        if "gloo" in str(error):  # another rank is gone: that is what should be said, by whoever knows
            return error
        found = TrainingError(
            f"Checkpoint: {self.address}/{folder_of(pending.step)} can't be written: {_first_line(error)}. "
            "Earlier checkpoints are untouched; free disk space or choose another run.dir, and start again."
        )
        found.__cause__ = error
        return found


def _sharded(value: Tensor) -> bool:
    return hasattr(value, "placements")  # a DTensor, whose import costs more than this


def _writes_shard(value: Any) -> bool:
    """Of ranks that hold the same shard, the first of its mesh writes it."""
    if not _sharded(value):
        return False
    place = value.device_mesh.get_coordinate()
    return place is not None and not any(
        place[dim] for dim, placement in enumerate(value.placements) if placement.is_replicate()
    )


def _check(address: str, tensors: Mapping[str, Tensor], reader: Any) -> None:
    stored = reader.read_metadata().state_dict_metadata
    for name, value in tensors.items():
        if name not in stored:
            raise ConfigError(
                f"Checkpoint: {address} has no {name!r}. Use the model and optimizer that wrote it (model, optimizer), "
                "or start afresh with another run.dir (run.dir)."
            )
        size = tuple(getattr(stored[name], "size", ()))
        if size != tuple(value.shape):
            raise ConfigError(
                f"Checkpoint: {name!r} has shape {size} in {address} and {tuple(value.shape)} in this run. "
                "Use the model that wrote it (model), or start afresh with another run.dir (run.dir)."
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
