"""Hosts with a disk each, whose checkpoints something else carries to one prefix, and is killed on the way."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from strategies.testing import Workers
from tests.trainer.jobs import ROWS, fit_on_hosts, lines

WORDS = [*ROWS, "schedule=constant", "checkpoint.every=2", "checkpoint.keep=0", "trainer.log_every=1"]
LAST = 12

# Copies what is new on both disks to the prefix, in an order of its own, in pieces that a kill may cut.
SYNC = """
import random, sys, time
from pathlib import Path
seed, prefix, *disks = sys.argv[1:]
order = random.Random(int(seed))
print("ready", flush=True)
while True:
    files = [(Path(disk), path) for disk in disks for path in Path(disk).rglob("*") if path.is_file()]
    order.shuffle(files)
    for disk, path in files:
        target = Path(prefix) / path.relative_to(disk)
        if not target.exists() or target.stat().st_size != path.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            with target.open("wb", buffering=0) as file:
                for start in range(0, len(content), 512):
                    file.write(content[start:start + 512])
                    time.sleep(0.0003)
"""


def complete(prefix: Path) -> int:
    """The newest step of which the prefix has every file that its manifest names, with every byte; 0: none."""
    steps = [0]
    for path in prefix.glob("step-*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())["content"]
        except ValueError:  # cut off
            continue
        sizes = {path.parent / name: size for name, (size, _) in manifest["files"].items()}
        if all(file.exists() and file.stat().st_size == size for file, size in sizes.items()):
            steps.append(int(path.parent.name.partition("-")[2]))
    return max(steps)


def test_hosts_go_on_from_the_newest_complete_checkpoint_whenever_the_upload_was_killed(
    workers: Workers, tmp_path: Path
) -> None:
    disks = [tmp_path / "a", tmp_path / "b"]
    places = [str(disk) for disk in disks]
    workers.run(fit_on_hosts, 2, str(tmp_path / "run"), [*WORDS, f"trainer.max_steps={LAST}"], places, local_size=1)
    begun = []
    for trial in range(20):
        prefix = tmp_path / f"prefix-{trial}"
        prefix.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", SYNC, str(trial), str(prefix), *places], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.Random(trial).uniform(0.02, 0.6))
            process.kill()
        fresh = [tmp_path / f"host-{trial}-{number}" for number in range(2)]
        for disk in fresh:  # as the service does before a job starts
            shutil.copytree(prefix, disk)
        run = tmp_path / f"run-{trial}"
        words = [*WORDS, f"trainer.max_steps={LAST + 1}"]
        expected = complete(prefix)
        ended = workers.run(fit_on_hosts, 2, str(run), words, [str(disk) for disk in fresh], local_size=1)
        if expected == 0 and any(prefix.glob("step-*/manifest.json")):
            assert "step-" in ended[0]["message"], "damaged ones alone are left to a person"
            begun.append((0, expected))
        else:
            begun.append((lines(run)[0]["step"] - 1, expected))
    assert [found for found, _ in begun] == [expected for _, expected in begun]
    assert len({expected for _, expected in begun}) > 2, "the kills fell into different checkpoints"
