"""What ZeRO-3 keeps on NVMe: masters, gradients and moments, and weights on request, in files mapped into memory.

To DeepSpeed they lie in host memory. The kernel reads a page when it is touched, and a sub-group is touched in its own
step alone: the next one is read ahead meanwhile, and the last one written and let go of.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies._fragments import Fragment, FragmentedOptimizer
from strategies.errors import ConfigError
from strategies.world import World

_NUMBER = 4
"""Bytes: all is fp32."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders on NVMe."""

    optimizer: str
    """For masters, gradients and moments."""
    weights: str | None = None
    """For weights; None: they lie elsewhere."""


class NVMe:
    """The files of this rank. They have no name, so that they are gone with the process, however it ends."""

    def __init__(self, place: Place, world: World, engine: Any, optimizer: FragmentedOptimizer) -> None:
        """Move there what DeepSpeed and our optimizer step. Collective.

        Args:
            place: where.
            world: the ranks.
            engine: of stage 3, its optimizer and weights offloaded to host memory.
            optimizer: that it steps, its pieces known.

        Raises:
            ConfigError: a folder isn't there, isn't on a disk, or has too little space; on every rank.
        """
        zero = engine.optimizer
        parts = [*optimizer.parts()]
        slots = [[slot for slot, value in optimizer.kinds(group).items() if value.ndim] for group, _, _ in parts]
        frozen = [value.ds_tensor for value in engine.module.parameters() if not value.requires_grad]
        frozen = [value for value in frozen if value.device.type == "cpu" and value.dtype == torch.float32]
        needs = [
            (place.optimizer, 2 + len(mine), flat.numel()) for (_, flat, _), mine in zip(parts, slots, strict=True)
        ]
        if place.weights is not None:
            needs += [(place.weights, 1, flat.numel()) for _, flat, _ in parts]
            needs += [(place.weights, 1, sum(value.numel() for value in frozen))] if frozen else []
        _check_space(needs, world)
        with world.together():
            made = [_Rows(*need) for need in needs]
        states, weights = made[: len(parts)], made[len(parts) :]
        self._groups = [[rows] for rows in states]
        self._numbers = {id(flat): number for number, (_, flat, _) in enumerate(parts)}
        self._homes: dict[tuple[str, str], Tensor] = {}
        for (_, flat, pieces), mine, rows in zip(parts, slots, states, strict=True):
            self._take(rows, flat, pieces, mine)
        for number, rows in enumerate(weights[: len(parts)]):
            zero.fp16_partitioned_groups_flat[number] = rows[0].copy_(zero.fp16_partitioned_groups_flat[number])
            zero._unflatten_partitioned_parameters(number)
            zero.param_groups_fp16_flat_cpu_memory = []
            self._groups[number].append(rows)
        for rows in weights[len(parts) :]:
            self._groups.append([rows])
            for value, home in zip(frozen, torch.split(rows[0], [value.numel() for value in frozen]), strict=True):
                value.data = home.copy_(value)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="nvme")
        self._stepped: int | None = None
        self.let_go()

    def _take(self, rows: _Rows, flat: Tensor, pieces: list[Fragment], slots: list[str]) -> None:
        flat.data, flat.grad = rows[0].copy_(flat.detach()), None
        flat.grad = rows[1]
        for piece in pieces:
            length = piece.value.numel()
            piece.value.data = flat.detach().narrow(0, piece.offset, length)
            for row, slot in enumerate(slots, start=2):
                self._homes[piece.name, slot] = rows[row].narrow(0, piece.offset, length)

    def keep(self, piece: Fragment, state: dict[str, Any]) -> None:
        """Put those moments of a piece that aren't there yet into its file; `state` has them there from then on."""
        for slot, value in state.items():
            home = self._homes.get((piece.name, slot))
            if home is not None and value.data_ptr() != home.data_ptr():
                state[slot] = home.copy_(value)

    def begin(self, flat: Tensor) -> None:
        """Before the step of a sub-group; the one before it is over, and so is the copy of its masters to its weights.

        Raises:
            OSError: the disk failed.
        """
        self.end()
        self._stepped = number = self._numbers[id(flat)]
        for rows in self._groups[number]:
            rows.written()
        for rows in self._groups[number + 1] if number + 1 < len(self._numbers) else []:
            self._pool.submit(rows.read_ahead)

    def end(self) -> None:
        """After the step of the last sub-group."""
        if self._stepped is not None:
            self._leave(self._groups[self._stepped])
            self._stepped = None

    def let_go(self) -> None:
        """Of all that is in memory, after everything was read or written."""
        for files in self._groups:
            self._leave(files)

    def close(self) -> None:
        """Give the space back, whoever still holds a tensor."""
        self._pool.shutdown()
        for files in self._groups:
            for rows in files:
                rows.close()

    def _leave(self, files: Iterable[_Rows]) -> None:
        for rows in files:
            rows.leave(self._pool)


class _Rows:
    """Rows of fp32 numbers, zeros at first, in one file."""

    def __init__(self, folder: str, rows: int, numbers: int) -> None:
        """Take the space on the disk, all of it now: a mapped page that finds none is the end of the process.

        Raises:
            ConfigError: there isn't so much, or the folder can't be written to.
        """
        self._stride, self._numbers = _stride(numbers), numbers
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (close)
            os.posix_fallocate(self._file.fileno(), 0, rows * self._stride)
            self._map = mmap.mmap(self._file.fileno(), 0)
        except OSError as error:
            raise ConfigError(
                f"DeepSpeedStrategy: {rows * self._stride} bytes can't be had on NVMe, in {folder}: {error.strerror}. "
                "Make space, or name another folder (strategy.nvme_path)."
            ) from None
        self._writing: Future[None] | None = None

    def __getitem__(self, row: int) -> Tensor:
        return torch.frombuffer(self._map, dtype=torch.float32, count=self._numbers, offset=row * self._stride)

    def read_ahead(self) -> None:
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def leave(self, pool: ThreadPoolExecutor) -> None:
        """Out of this process at once, and out of memory when it is written."""
        self.written()
        self._map.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: nothing is lost
        self._writing = pool.submit(self._write)

    def _write(self) -> None:
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def written(self) -> None:
        """Wait until what was left is on the disk."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a file system that can't: when the last tensor is gone
            self._map.madvise(mmap.MADV_REMOVE)
        self._file.close()


def _stride(numbers: int) -> int:
    """Bytes of a row, in whole pages."""
    return -(-numbers * _NUMBER // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_space(needs: list[tuple[str, int, int]], world: World) -> None:
    """Compare what all ranks of a machine need with what there is on each disk.

    Args:
        needs: for each file its folder, how many rows, and numbers in a row.
        world: the ranks.
    """
    mine: dict[str, list[Any]] = {}
    with world.together():
        for folder in sorted({folder for folder, _, _ in needs}):
            size = sum(rows * _stride(numbers) for where, rows, numbers in needs if where == folder)
            mine[folder] = [platform.node(), _disk(folder), folder, size, _free(folder)]
    disks: dict[tuple[str, int], list[list[Any]]] = {}
    for each in (entry for entries in world.gather([*mine.values()]) for entry in entries):
        disks.setdefault((each[0], each[1]), []).append(each)
    for (machine, _), entries in disks.items():
        size, (_, _, folder, _, free) = sum(entry[3] for entry in entries), entries[0]
        if size > free:
            raise ConfigError(
                f"DeepSpeedStrategy: the ranks of {machine} need {_gib(size)} on NVMe in {folder}, and {_gib(free)} "
                "are free there. Make space, or name a folder on another disk (strategy.nvme_path)."
            )


def _disk(folder: str) -> int:
    """The number of its device."""
    if sys.platform != "linux":
        raise ConfigError(
            "DeepSpeedStrategy: NVMe is for Linux. Use strategy=zero3_offload (strategy.offload_optimizer)."
        )
    if not Path(folder).is_dir():
        raise ConfigError(
            f"DeepSpeedStrategy: nvme_path={folder} is no folder on {platform.node()}. Make it on the NVMe disk of "
            "each machine, or name another (strategy.nvme_path)."
        )
    if (kind := file_system(folder)) in ("tmpfs", "ramfs"):
        raise ConfigError(
            f"DeepSpeedStrategy: nvme_path={folder} lies in memory ({kind}), so nothing would be won. Name a folder "
            "on a disk, or use strategy=zero3_offload (strategy.nvme_path)."
        )
    return Path(folder).stat().st_dev


def file_system(folder: str) -> str | None:
    """Its kind, where the kernel says."""
    device = Path(folder).stat().st_dev
    return dict(_mounted()).get(f"{os.major(device)}:{os.minor(device)}")


def _free(folder: str) -> int:
    return shutil.disk_usage(folder).free


def _mounted() -> Iterator[tuple[str, str]]:
    """Device -> kind of file system."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        yield before.split()[2], after.split()[0]


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
