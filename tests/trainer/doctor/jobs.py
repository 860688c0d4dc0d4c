"""Functions for worker processes: the doctor among ranks that are on several hosts, are missing, or die."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from unittest import mock

from tests.starts import Start, start
from tests.trainer.commands.jobs import command


def on_hosts(words: list[str], slow_sender: int | None = None) -> tuple[int, str, str]:
    """`shardwright doctor` where each rank is a host of its own.

    Args:
        words: after `doctor`.
        slow_sender: what this rank sends takes twenty times as long.
    """
    from trainer.doctor import pairs

    rank = int(os.environ["RANK"])
    sent = pairs._sent

    def slowly(*arguments: object) -> float:
        took: float = sent(*arguments)  # type: ignore[arg-type]
        return took * (20 if rank == slow_sender else 1)

    with (
        mock.patch("trainer.doctor.hosts.this_host", return_value=[f"algo-{rank + 1}", "boot", "net"]),
        mock.patch("trainer.doctor.pairs._sent", slowly),
    ):
        return command(["doctor", *words])


def dying(words: list[str]) -> tuple[int, str, str]:
    """Rank 1 is gone in the middle."""
    rank = int(os.environ["RANK"])
    measure = mock.patch("trainer.doctor.measure.measure_speed", side_effect=lambda *_: os._exit(9))
    with measure if rank == 1 else contextlib.nullcontext():
        return command(["doctor", *words])


def told_to_train(words: list[str], level: str) -> Start:
    """A run that begins with the doctor, for whom the disk is as `level` says."""
    from trainer.doctor.disk import DiskCheck

    def judge(self: DiskCheck, found: object) -> list[object]:
        say = {"ok": self.ok, "warning": self.warning, "failure": self.failure}[level]
        return [say("/f: 1.0 of 9.0 GiB free")]

    with mock.patch.object(DiskCheck, "judge", judge):
        return start(words, (), "Rows")


def findings(folder: Path) -> dict[str, dict[str, object]]:
    """Of `doctor.json`, by check."""
    import json

    found = json.loads((folder / "doctor.json").read_text())
    return {each["check"]: each for each in found["findings"]}


def complaints(err: str) -> list[str]:
    """Lines on stderr, without those that say now and then on a slow machine what is being done."""
    return [line for line in err.splitlines() if not line.startswith("doctor: ")]
