"""ZeRO-Infinity: the memory that it saves, what it leaves on the disk, folders that it can't use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from strategies import _nvme
from strategies import _testing_jobs as jobs
from strategies._testing_model import Job
from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, ModelSpec, Plan, Strategy, Weights, WorldSpec
from strategies.deepspeed import DeepSpeedStrategy, Offload
from strategies.errors import ConfigError
from strategies.testing import Recipe, Workers, check_numbers, check_tensors
from trainer.optim import AdamWOptimizer

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)
if _nvme.file_system(tempfile.gettempdir()) == "tmpfs":
    pytest.skip("needs temporary files on a disk (TMPDIR)", allow_module_level=True)

NVME: dict[str, Any] = {"stage": 3, "offload_optimizer": Offload.nvme, "offload_parameters": Offload.nvme}
CPU: dict[str, Any] = {"stage": 3, "offload_optimizer": Offload.cpu, "offload_parameters": Offload.cpu}


class Wide(nn.Sequential):
    """Many numbers and little work."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


class Run:
    """Two ranks of it on the way."""

    def __init__(self, settings: dict[str, Any], width: int = 64, depth: int = 4) -> None:
        self.strategy = DeepSpeedStrategy(**settings, bucket_mb=1, prefetch_mb=1, persist_numbers=0)
        self._batch = Batch(inputs={"input": torch.full((1, width), 0.1)}, labels=torch.zeros(1), num_targets=1)
        self._shape = width, depth

    def __enter__(self) -> Run:
        try:
            self.strategy.connect(GlooBackend(timeout_s=60))
            self.model, self.optimizer = self.strategy.setup(
                Wide(*self._shape),
                Weights(seed=0, fill=lambda module: None),
                lambda named: AdamWOptimizer().make(list(named)),
                Plan(micro_batch=1),
            )
        except BaseException:
            self.strategy.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.strategy.close()

    def step(self) -> None:
        self.strategy.forward_backward(self.model, [self._batch], _summed, 2.0)
        self.strategy.step(self.model, self.optimizer)


def _summed(outputs: torch.Tensor, batch: Batch) -> LossTerms:
    return LossTerms(loss=outputs.square().sum())


# Memory.


def anonymous() -> int:
    """Bytes of this process that belong to no file, without what was freed already."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = Path("/proc/self/status").read_text()
    return int(next(line for line in found.splitlines() if line.startswith("RssAnon:")).split()[1]) * 1024


def taken(settings: dict[str, Any], width: int, depth: int) -> tuple[float, float]:
    """Bytes of memory for each number of a rank's share: between steps, and the most after a sub-group's step."""
    with Run(settings, width, depth) as run:  # what is imported, or kept by the allocator, isn't meant
        run.step()
        run.step()
    del run
    before, share = anonymous(), width * width * depth / 2
    with Run(settings, width, depth) as run:
        run.step()
        seen: list[int] = []
        run.optimizer.register_step_post_hook(lambda *_: seen.append(anonymous()))
        run.step()
        return (anonymous() - before) / share, (max(seen) - before) / share


def test_host_memory_falls_to_what_computing_takes(workers: Workers, tmp_path: Path) -> None:
    width, depth = 1024, 16
    on_disk = {**NVME, "nvme_path": str(tmp_path), "sub_group_numbers": 2**19}
    offloaded, on_nvme = (workers.run(taken, 2, each, width, depth, timeout=120) for each in (CPU, on_disk))
    # Weights, masters, two moments, and gradients twice: where DeepSpeed computes, and where it steps.
    assert offloaded == [(pytest.approx(24, abs=5), pytest.approx(24, abs=5))] * 2
    assert on_nvme == [(pytest.approx(4, abs=5), pytest.approx(4, abs=5))] * 2


# The disk.


def opened_below(folder: str) -> list[int]:
    """Duplicates of this process's open files below `folder`, named or not; other threads close theirs meanwhile."""
    files = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(folder):
                files.append(os.dup(int(link.name)))
    return files


def left(folder: str) -> tuple[list[str], int, int]:
    """Names while it runs; bytes on the disk then, and after it with a moment still held."""
    with Run({**NVME, "nvme_path": folder}) as run:
        run.step()
        names = [path.name for path in Path(folder).iterdir()]
        files = opened_below(folder)
        during = sum({os.fstat(file).st_ino: os.fstat(file).st_blocks for file in files}.values()) * 512
        held = [*run.optimizer.state.values()]
    after = sum(os.fstat(file).st_blocks for file in files) * 512
    for file in files:
        os.close(file)
    assert held
    return names, during, after


def test_files_have_no_name_and_their_space_is_given_back_at_close(workers: Workers, tmp_path: Path) -> None:
    for names, during, after in workers.run(left, 2, str(tmp_path), timeout=60):
        assert names == []  # so nothing stays behind that another run could meet, even after a kill
        assert during >= 20 * 64 * 64 * 4 / 2
        assert after < during / 10


def refusal(path: str, free: int | None = None) -> str:
    real = _nvme._free
    if free is not None:
        _nvme._free = lambda folder: free
    try:
        with Run({**NVME, "nvme_path": path.format(rank=os.environ["RANK"])}):
            return ""
    except ConfigError as error:
        return str(error)
    finally:
        _nvme._free = real


def test_folder_that_it_cannot_use_is_refused_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    cases: list[tuple[str, int | None, str]] = [
        (f"{tmp_path}/{{rank}}", None, f"nvme_path={tmp_path}/1 is no folder on"),
        (str(tmp_path), 2**17, f"need 0.000305 GiB on NVMe in {tmp_path}, and 0.000122 GiB are free there"),
    ]
    if Path("/dev/shm").is_dir() and _nvme.file_system("/dev/shm") == "tmpfs":
        cases.append(("/dev/shm", None, "nvme_path=/dev/shm lies in memory (tmpfs)"))
    for path, free, complaint in cases:
        heard = workers.run(refusal, 2, path, free, timeout=60)
        assert len(set(heard)) == 1
        assert complaint in heard[0]
        assert "\n" not in heard[0]
        assert "strategy.nvme_path" in heard[0]


# State.


class Three(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3)


class Infinity(Recipe):
    def make(self, *, unused: bool = False) -> Strategy:
        return DeepSpeedStrategy(stage=3, offload_optimizer=Offload.nvme, sub_group_numbers=500)


def test_run_goes_on_from_stage_3_and_stage_3_from_it(workers: Workers) -> None:
    job = Job(rule="adamw", lr=0.01, numbers="fp32", clip_norm=0.2, unused=True, steps=tuple(range(6)))
    first, rest = job.over(job.steps[:3]), job.over(job.steps[3:])
    wanted = workers.run(jobs.train_job, 2, Three, job, None)[0]
    for here, there in ((Three, Infinity), (Infinity, Three)):
        [start, *_] = workers.run(jobs.train_job, 2, here, first, None)
        [end, *_] = workers.run(jobs.train_job, 2, there, rest, start.snapshot)
        check_numbers(end.losses, wanted.losses[3:], absolute=5e-6, what="loss")
        check_tensors(end.snapshot.optim, wanted.snapshot.optim, 1e-4, "moment")


def test_footprint_counts_what_is_on_nvme_apart() -> None:
    spec, world, plan = (
        ModelSpec(num_parameters=800, num_trainable=800),
        WorldSpec(size=8, local_size=8),
        Plan(micro_batch=1),
    )
    cpu, nvme = (DeepSpeedStrategy(**settings).footprint(spec, world, plan) for settings in (CPU, NVME))
    moments = nvme.moments_bytes
    masters = weights = added_up = stepped = 400  # gradients are added up in one row, and stepped in another
    assert (cpu.host_bytes, cpu.nvme_bytes) == (masters + moments + weights + added_up + stepped, 0)
    assert (nvme.host_bytes, nvme.nvme_bytes) == (added_up, masters + moments + weights + stepped)
