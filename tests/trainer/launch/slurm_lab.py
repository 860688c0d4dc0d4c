"""A real Slurm on this machine: a controller and two nodes, all of them processes of its own, in a temporary folder.

The nodes' names are addresses of the loopback, so that ranks meet by the names that srun gives them. As root only: that
is who may run Slurm's daemons without a system around them.
"""

from __future__ import annotations

import contextlib
import os
import random  # a job's number decides its port
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={forget_s}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout={miss_node_s}
InactiveLimit=0
MinJobAge=300
FirstJobId={first}
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What is needed to run a lab and isn't here; empty: nothing."""
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(lacking)}: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs root"


class Lab:
    """While it is open, Slurm's programs find it by `SLURM_CONF`, which it sets.

    Args:
        folder: for everything it writes.
        miss_node_s: how long a node may be silent before the controller gives it up.
        forget_s: how long a requeued job waits before it is started again; 120 unless set.
    """

    def __init__(self, folder: Path, *, miss_node_s: int = 300, forget_s: int = 15) -> None:
        self._folder = folder
        self.names = ("127.0.0.2", "127.0.0.3")
        ports = [_free_port() for _ in range(3)]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={name} Port={port} CPUs=4 RealMemory=2000 State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        text = _CONF.format(
            host=socket.gethostname().partition(".")[0], folder=folder, ports=ports, nodes=nodes,
            names=",".join(self.names), miss_node_s=miss_node_s, forget_s=forget_s, first=random.randint(1, 50_000),
        )  # fmt: skip
        (folder / "state").mkdir(parents=True)
        self._conf = folder / "slurm.conf"
        self._conf.write_text(text)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._variables = {**os.environ, "SLURM_CONF": str(self._conf)}

    @contextlib.contextmanager
    def open(self) -> Iterator[Lab]:
        """Start everything; at the end nothing of it is left."""
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self._conf)
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for name in self.names:
                self.start_node(name)
            self.wait_until("both nodes are idle", lambda: self._nodes().count("idle") == 2)
            yield self
        finally:
            self._close()
            if before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = before

    def start_node(self, name: str) -> None:
        """Let it take jobs, for the first time or again."""
        (self._folder / f"spool.{name}").mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if its power were cut: its daemon and everything that it runs die at once, and nobody is told."""
        daemon = self._daemons.pop(name)
        self._kill([psutil.Process(daemon.pid), *self._managers(name)])
        daemon.wait()

    def _managers(self, name: str) -> list[psutil.Process]:
        """Of the steps that a node runs; they have left its daemon's family."""
        log, found = str(self._folder / f"slurmd.{name}.log"), []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd") and any(log == each.path for each in process.open_files()):
                    found.append(process)
        return found

    def _kill(self, processes: Sequence[psutil.Process]) -> None:
        for each in processes:  # else one of them may still tell how its children ended
            with contextlib.suppress(psutil.Error):
                each.suspend()
        for each in processes:
            for process in (*_below(each), each):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def ask(self, *words: str) -> str:
        """What a program of Slurm's says."""
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout

    def wait_until(self, what: str, holds: object, timeout_s: float = 60.0) -> None:
        """Until `holds()` is true."""
        assert callable(holds)
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, (
                f"not within {timeout_s} s: {what}\n{self.ask('squeue', '-a')}\n{self._nodes()}"
            )
            time.sleep(0.5)

    def _nodes(self) -> str:
        return self.ask("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T")

    def _start_munge(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._folder.chmod(0o755)
        files = [f"--{name}={self._folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2", *files)
        self.wait_until("munge is up", (self._folder / "munge.socket").exists)

    def _start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=self._variables,
                start_new_session=True,
            )  # fmt: skip

    def _close(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.ask("scancel", "--user=root")
            self.wait_until("the jobs end", lambda: not self.ask("squeue", "--noheader").strip(), timeout_s=15)
        for name in self.names:
            self._kill(self._managers(name))
        for daemon in reversed(self._daemons.values()):
            if daemon.poll() is None:
                daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                self._kill([psutil.Process(daemon.pid)])
                daemon.wait()


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
