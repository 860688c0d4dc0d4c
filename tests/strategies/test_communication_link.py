"""Communication over a link whose rate is known: two hosts in network namespaces, shaped by `tc`.

`SHARDWRIGHT_CLUSTER=all python -m pytest tests/strategies/test_communication_link.py`, as root, with iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MBIT = 200
WIDTH = 1024  # two matrices of this side: 8.4 MB of gradients, 0.34 s on the way at this rate

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SHARDWRIGHT_CLUSTER") != "all", reason="needs root; SHARDWRIGHT_CLUSTER=all runs it"
    ),
    pytest.mark.skipif(shutil.which("tc") is None, reason="there is no tc (apt-get install iproute2)"),
]

JOB = """
import json, sys, time
import torch
from torch import nn
from torch.optim import SGD
from strategies.backends import GlooBackend
from strategies.base import Batch, LossTerms, Plan, Weights
from strategies.ddp import DDPStrategy
from strategies.fsdp import FSDPStrategy

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    def forward(self, x):
        return self.two(self.one(x))

strategy = {"ddp": DDPStrategy, "fsdp": FSDPStrategy}[sys.argv[1]]()
world = strategy.connect(GlooBackend(timeout_s=60.0))
model, optimizer = strategy.setup(Model(), Weights(seed=0, fill=lambda _: None),
                                  lambda named: SGD([value for _, value in named], lr=1e-3), Plan(micro_batch=1))
def sent():
    return int(open("/sys/class/net/v0/statistics/tx_bytes").read())

found = []
for step in range(6):
    world.barrier()
    before = sent()
    batch = Batch(inputs={"x": torch.ones(1, WIDTH)}, labels=torch.zeros(1), num_targets=1)
    strategy.forward_backward(model, [batch], lambda y, _: LossTerms(loss=y.square().sum()), 2.0)
    info = strategy.step(model, optimizer)
    found.append((info.communication_s, info.communication_total_s, sent() - before))
if world.rank == 0:
    print(json.dumps(found))
strategy.close()
""".replace("WIDTH", str(WIDTH))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with a link of MBIT between them."""
    names = [f"sw{os.getpid()}{side}" for side in "ab"]
    links = [f"v{os.getpid() % 100000}{side}" for side in "ab"]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            ip("-n", name, "link", "set", link, "name", "v0")
            ip("-n", name, "address", "add", f"10.98.0.{number}/24", "dev", "v0")
            for device in ("lo", "v0"):
                ip("-n", name, "link", "set", device, "up")
            shape = ["tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate", f"{MBIT}mbit", "burst", "64kb"]
            ip("netns", "exec", name, *shape, "latency", "400ms")
        yield names


def measured(hosts: list[str], strategy: str) -> list[tuple[float, float, int]]:
    """Exposed and whole communication of each step on rank 0, and the bytes that it has sent."""
    started = []
    for rank, host in enumerate(hosts):
        variables = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.98.0.1", "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": "v0", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = ["ip", "netns", "exec", host, sys.executable, "-c", JOB, strategy]
        started.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
    try:
        out = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    steps: list[tuple[float, float, int]] = json.loads(out[0].splitlines()[-1])
    return steps


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_communication_takes_as_long_as_the_link_needs(hosts: list[str], strategy: str) -> None:
    steps = measured(hosts, strategy)[2:]  # the first ones connect, and DDP puts its buckets together
    for exposed, whole, sent in steps:
        assert sent > 2 * WIDTH * WIDTH * 4, "each rank sends as many bytes as there are gradients, or more"
        needed = sent * 8 / (MBIT * 1e6)
        assert 0.9 * needed < whole, f"{whole} s, the link needs {needed} s: {steps}"
        assert exposed > 0.8 * needed, "there is next to nothing to hide behind"
    # A busy machine only adds to it: that of the other rank is waited for, too.
    least, sent = min((whole, sent) for _, whole, sent in steps)
    assert least < 1.5 * sent * 8 / (MBIT * 1e6), f"never near what the link needs: {steps}"
