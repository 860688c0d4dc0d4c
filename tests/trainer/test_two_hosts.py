"""Two hosts in network namespaces, and the cable between them cut. Needs root; behind SHARDWRIGHT_CLUSTER=all."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.test_cli import environment, num_lines
from tests.trainer.commands.jobs import ROOT
from tests.trainer.jobs import TINY, lines

pytestmark = [
    pytest.mark.skipif(os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="SHARDWRIGHT_CLUSTER=all runs it"),
    pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs the program ip, as root"),
    pytest.mark.timeout(400),
]
TRAIN = ROOT / "scripts" / "train.py"
STATIC = ("--nnodes=2", "--node-rank={number}", "--master-addr=host-0", "--master-port=29500")
C10D = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=host-0:29400", "--rdzv-id=x", "--local-addr={address}")
FORMS = {"static": STATIC, "c10d": C10D}
AMONG = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from trainer.launch.agent import Meeting
from trainer.launch.local import launch_local
meeting = Meeting.among(["host-0", "host-1"], int(sys.argv[1]), 7777)
sys.exit(launch_local(Path(sys.argv[2]), sys.argv[3:], 1, 0, meeting))
"""


@dataclass
class Hosts:
    """Each sees its own name, addresses and disk."""

    folder: Path
    names: list[str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, form: str, *words: str) -> list[subprocess.Popen[str]]:
        """Start the same job on both."""
        found = []
        for number, name in enumerate(self.names):
            mine = self.folder / f"disk-{number}"
            mine.mkdir(exist_ok=True)
            job = [str(TRAIN), *TINY, f"run.dir={mine / 'run'}", "checkpoint.every=10", *words]
            if form == "launch":
                program = mine / "among.py"
                program.write_text(AMONG.format(root=str(ROOT)))
                command = [sys.executable, str(program), str(number), *job]
            else:
                flags = [
                    flag.format(number=number, address=address(number)) for flag in (C10D, STATIC)[form == "static"]
                ]
                command = [sys.executable, "-m", "torch.distributed.run", *flags, *job]
            inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']
            with (mine / "out").open("w") as out, (mine / "err").open("w") as err:
                found.append(
                    subprocess.Popen(
                        [*inside, f"host-{number}", *command], stdout=out, stderr=err, cwd=mine, text=True,
                        env={**environment(), "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)},
                    )
                )  # fmt: skip
        self.started += found
        return found

    def wait_until_trains(self, num: int = 25) -> None:
        end = time.monotonic() + 150
        while num_lines(self.folder / "disk-0" / "run") < num:
            assert all(process.poll() is None for process in self.started[-2:]), self.said(0) + self.said(1)
            assert time.monotonic() < end
            time.sleep(0.1)

    def cable(self, state: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.names[1], "ip", "link", "set", "eth0", state], check=True)

    def said(self, number: int) -> list[str]:
        text = (self.folder / f"disk-{number}" / "err").read_text()
        return [line for line in text.splitlines() if line.startswith(("TrainingError", "ConfigError"))]

    def worker(self, number: int) -> psutil.Process:
        [found] = [
            process
            for process in psutil.process_iter()
            if f"{self.folder}/disk-{number}/run" in " ".join(_words_of(process)[:40])
            and _words_of(process)[:3] == [sys.executable, "-u", str(TRAIN)]
        ]
        return found

    def newest_checkpoint(self) -> int:
        """The last step that is whole on the disk of rank 0, which writes it."""
        found = (self.folder / "disk-0" / "run" / "checkpoints").glob("*/manifest.json")
        return max(int(path.parent.name.removeprefix("step-")) for path in found)


def _words_of(process: psutil.Process) -> Sequence[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def address(number: int) -> str:
    return f"10.98.7.{number + 1}"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    names = [f"wd{os.getpid()}-{number}" for number in (0, 1)]
    cables = [f"w{os.getpid()}{end}" for end in "ab"]
    etc = [Path("/etc/netns") / name for name in names]
    found = Hosts(tmp_path, names)

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name, folder in zip(names, etc, strict=True):
            ip("netns", "add", name)
            folder.mkdir(parents=True)
            known = ["127.0.0.1 localhost", *(f"{address(number)} host-{number}" for number in (0, 1))]
            (folder / "hosts").write_text("\n".join(known) + "\n")
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            inside = ["netns", "exec", name, "ip"]
            ip(*inside, "link", "set", cable, "name", "eth0")
            ip(*inside, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            ip(*inside, "link", "set", "lo", "up")
        yield found
    finally:
        for name in names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in inside.split():
                with contextlib.suppress(psutil.Error):
                    psutil.Process(int(pid)).kill()
        for process in found.started:
            process.wait(20)
        for name, folder in zip(names, etc, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("form", ["static", "c10d", "launch"])
def test_cut_cable_ends_both_sides_and_the_run_goes_on_when_it_is_back(hosts: Hosts, form: str) -> None:
    processes = hosts.run(form, "trainer.max_steps=1000000")
    hosts.wait_until_trains()
    hosts.cable("down")
    begin = time.monotonic()
    codes = [process.wait(90) for process in processes]
    passed = time.monotonic() - begin
    assert passed < 60
    assert codes[0] == 1
    # c10d's torchrun is killed where it doesn't come out of its waiting for the host that is gone.
    assert codes[1] in ((1, -9) if form == "c10d" else (1,))
    [near], [far] = hosts.said(0), hosts.said(1)
    assert near.startswith("TrainingError: rank 1 is gone with its machine (host-1)")
    assert far.startswith("TrainingError: the machine where the ranks meet (")
    reached = lines(hosts.folder / "disk-0" / "run")[-1]["step"]
    newest = hosts.newest_checkpoint()
    assert reached - newest < 20, "every 10, and the last one may have been on its way"

    hosts.cable("up")
    again = hosts.run(form, f"trainer.max_steps={reached + 3}")
    assert [process.wait(150) for process in again] == [0, 0], hosts.said(0) + hosts.said(1)
    out = (hosts.folder / "disk-0" / "out").read_text()
    assert f"(step {newest})" in out
    steps = [line["step"] for line in lines(hosts.folder / "disk-0" / "run") if "loss" in line]
    assert steps == list(range(1, reached + 4))


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_worker_of_another_host_is_named_within_the_time(hosts: Hosts, victim: int) -> None:
    processes = hosts.run("static", "trainer.max_steps=1000000", "trainer.hang_timeout=12")
    hosts.wait_until_trains()
    hosts.worker(victim).suspend()
    begin = time.monotonic()
    while not hosts.said(1 - victim):
        assert time.monotonic() - begin < 30
        time.sleep(0.1)
    named_s = time.monotonic() - begin
    assert named_s < 12 + 4
    [line] = hosts.said(1 - victim)
    assert line.startswith(f"TrainingError: no progress for 12 s: rank {victim} (host-{victim}) doesn't answer")
    assert processes[1 - victim].wait(60) == 1
    hosts.worker(victim).resume()  # nobody else on its machine could
    assert processes[victim].wait(60) == 1
