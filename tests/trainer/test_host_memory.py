"""Freed memory stays with the process, unless the user says how malloc shall work."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.trainer.commands.jobs import ROOT

PROGRAM = """
import resource, torch
from trainer.host_memory import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 21)  # 8 MiB, freed at once
    torch.ones(1 << 22)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(6)][-1])
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")


def in_the_end(**environment: str) -> int:
    """Page faults of taking the same memory for the sixth time."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=ROOT, env={**plain, **environment}, capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


def test_keep_freed_memory_takes_it_again_without_page_faults() -> None:
    assert in_the_end() < 10


def test_keep_freed_memory_leaves_a_users_settings_alone() -> None:
    assert in_the_end(MALLOC_MMAP_THRESHOLD_="131072") > 10
