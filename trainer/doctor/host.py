"""Versions, memory and limits of a host."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.doctor.check import Asked, Check, differing, text_of
from trainer.doctor.findings import Finding, plural

_GIB = 2**30
_MUST_AGREE = ("python", "torch", "nccl", "cuda", "shardwright")
_SETTINGS = ("NCCL_", "FI_", "GLOO_", "TORCH_NCCL_", "OFI_NCCL_", "RDMAV_")
_OWN_PER_HOST = ("NCCL_DEBUG_FILE",)


class VersionsCheck(Check):
    """What is installed, and which variables steer the communication; alike on all hosts."""

    name = "versions"

    def look(self, asked: Asked) -> dict[str, Any]:
        import torch

        from trainer.run_folder import git_commit, package_versions

        nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else nccl,
            "driver": _driver(),
            "kernel": platform.release(),
            "commit": git_commit(),
            **package_versions(),
            "settings": {
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(_SETTINGS) and name not in _OWN_PER_HOST
            },
        }

    def judge(self, found: Any) -> list[Finding]:
        names = ("python", "torch", "nccl", "cuda", "driver", "shardwright")
        return [self.ok(", ".join(f"{name} {found[name]}" for name in names if found.get(name)))]

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        found = []
        for name in dict.fromkeys(name for each in hosts.values() for name in each if name != "settings"):
            if text := differing({host: each.get(name) for host, each in hosts.items()}):
                say = self.failure if name in _MUST_AGREE else self.warning
                found.append(say(f"{name} differs: {text}", "Start all hosts from one image"))
        for name in dict.fromkeys(name for each in hosts.values() for name in each["settings"]):
            if text := differing({host: each["settings"].get(name) for host, each in hosts.items()}):
                found.append(self.warning(f"{name} differs: {text}", "Set it alike on all hosts, or on none"))
        return found


def _driver() -> str | None:
    """NVIDIA's, as the kernel tells it: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  ...`."""
    words = (text_of("/proc/driver/nvidia/version") or "").partition("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


class MemoryCheck(Check):
    """Host memory, processors, and threads for them."""

    name = "memory"

    def look(self, asked: Asked) -> dict[str, Any]:
        import psutil

        memory = psutil.virtual_memory()
        return {
            "total_gib": memory.total / _GIB,
            "free_gib": memory.available / _GIB,
            "limit_gib": _limit_gib(),
            "cpus": len(os.sched_getaffinity(0)),
            "ranks": asked.ranks_here,
            "threads": asked.threads,
        }

    def judge(self, found: Any) -> list[Finding]:
        free, ranks, threads = found["free_gib"], found["ranks"], found["threads"]
        size = f"{free:.1f} of {found['total_gib']:.1f} GiB free"
        if found["limit_gib"] is not None and found["limit_gib"] < found["total_gib"]:
            size += f", {found['limit_gib']:.1f} GiB allowed here"
        work = f"{plural(found['cpus'], 'processor')} for {plural(ranks, 'rank')} of {plural(threads, 'thread')}"
        findings = [self.ok(f"{size}; {work}")]
        if free < max(1.0, 0.05 * found["total_gib"]):
            findings = [self.warning(size, "See what else runs there, or the kernel will end a rank")]
        if ranks * threads > found["cpus"] and ranks > 1:
            fits = max(1, found["cpus"] // ranks)
            if threads > fits:
                findings.append(self.warning(work, f"Ranks will wait for each other: OMP_NUM_THREADS={fits}"))
        return findings

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        found = []
        for key, what in (("total_gib", "memory in GiB"), ("cpus", "number of processors")):
            if text := differing({host: round(each[key]) for host, each in hosts.items()}):
                found.append(self.warning(f"{what} differs: {text}", "The smallest host decides what fits"))
        return found


def _limit_gib() -> float | None:
    """What the container may use."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = text_of(path)
        if text is not None and text.isdigit():
            return int(text) / _GIB
    return None


class LimitsCheck(Check):
    """What a process may have: locked memory, open files, processes."""

    name = "limits"

    def look(self, asked: Asked) -> dict[str, Any]:
        kinds = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        found: dict[str, Any] = {}
        for name, kind in kinds.items():
            soft, _ = resource.getrlimit(kind)
            found[name] = None if soft == resource.RLIM_INFINITY else soft
        return {**found, "rdma": Path("/sys/class/infiniband").is_dir()}

    def judge(self, found: Any) -> list[Finding]:
        said = {name: "unlimited" if found[name] is None else found[name] for name in ("memlock", "nofile", "nproc")}
        findings = []
        if found["rdma"] and found["memlock"] is not None:
            say = self.failure if found["memlock"] < _GIB else self.warning
            findings.append(
                say(
                    f"{found['memlock']:,} bytes may be locked, and there are devices for RDMA, which register memory",
                    "Set ulimit -l unlimited (containers: --ulimit memlock=-1)",
                )
            )
        for name, least, why in (
            ("nofile", 4096, "each rank opens connections, files and workers"),
            ("nproc", 4096, "threads and data workers count"),
        ):
            if found[name] is not None and found[name] < least:
                flag = {"nofile": "-n 65536", "nproc": "-u unlimited"}[name]
                findings.append(self.warning(f"{name} is {found[name]:,}: {why}", f"Set ulimit {flag}"))
        return findings or [self.ok(", ".join(f"{name} {value}" for name, value in said.items()))]


class SharedMemoryCheck(Check):
    """What is mounted at /dev/shm, through which ranks of a host and data workers exchange data."""

    name = "shared memory"
    folder = Path("/dev/shm")  # noqa: S108 - only its size is asked for

    def look(self, asked: Asked) -> dict[str, Any]:
        if not self.folder.is_dir():
            return {"total_gib": 0.0, "free_gib": 0.0}
        usage = shutil.disk_usage(self.folder)
        return {"total_gib": usage.total / _GIB, "free_gib": usage.free / _GIB}

    def judge(self, found: Any) -> list[Finding]:
        what = f"{found['free_gib']:.2f} of {found['total_gib']:.2f} GiB free in {self.folder}"
        advice = "Give the container more: docker --shm-size=8g, or in Kubernetes an emptyDir of medium Memory"
        if found["total_gib"] < 1.0:
            return [self.warning(f"{what}: data workers and NCCL die of less than they need", advice)]
        if found["free_gib"] < 0.1 * found["total_gib"]:
            return [self.warning(what, "See what is left in it of processes that are gone")]
        return [self.ok(what)]
