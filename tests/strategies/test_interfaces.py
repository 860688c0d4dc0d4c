"""Network interfaces by name, by what their names begin with, and by exclusion."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from strategies.errors import ConfigError
from strategies.interfaces import choose, loopback

MACHINE = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "eth1": "10.0.1.1", "eth10": "fe80::1", "docker0": "172.17.0.1",
           "veth1a": "169.254.0.1", "efa0": None, "ens9": "10.0.9.9"}  # fmt: skip
DOWN = {"ens9"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight interfaces: one without an address, one that is down."""

    def places(address: str | None) -> list[SimpleNamespace]:
        family = socket.AF_INET6 if address and ":" in address else socket.AF_INET
        link = SimpleNamespace(family=psutil.AF_LINK, address="02:00:00:00:00:01")
        return [link] if address is None else [link, SimpleNamespace(family=family, address=address)]

    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: places(address) for name, address in MACHINE.items()})
    states = {name: SimpleNamespace(isup=name not in DOWN) for name in MACHINE}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


@pytest.mark.parametrize(
    ("wanted", "nccl", "gloo"),
    [
        ("eth0", "=eth0", "eth0"),
        ("eth1", "=eth1", "eth1"),
        ("=eth1", "=eth1", "eth1"),
        ("eth0,eth1", "=eth0,eth1", "eth0,eth1"),
        ("=eth0,eth1", "=eth0,eth1", "eth0,eth1"),
        ("eth0,eth0", "=eth0", "eth0"),
        ("eth", "=eth0,eth1,eth10", "eth0"),
        ("ens,eth1", "=ens9,eth1", "ens9"),
        ("lo", "=lo", "lo"),
        ("^docker,veth", "=eth0,eth1,eth10", "eth0"),
        ("^lo,docker,veth,eth1", "=eth0", "eth0"),
        ("^=docker0,veth1a,eth1", "=eth0,eth10", "eth0"),
    ],
)
def test_choose_comes_to_the_names_that_nccl_would_take(machine: None, wanted: str, nccl: str, gloo: str) -> None:
    found = choose(wanted)
    assert (found.for_nccl(), found.for_gloo()) == (nccl, gloo)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("eth7", "of this machine that has an address. It has docker0, ens9, eth0, eth1"),
        ("efa0", "is not a network interface"),
        ("=eth", "is not a network interface"),
        ("eth0,wlan", "is not a network interface"),
        ("^e,docker,veth", "leaves none of this machine's network interfaces"),
        ("", "has an empty name"),
        ("^", "has an empty name"),
        ("eth0,,eth1", "has an empty name"),
    ],
)
def test_choose_refuses_what_comes_to_nothing(machine: None, wanted: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"^Backend: interface=.*\(backend.interface\)\.$") as caught:
        choose(wanted)
    assert expected in str(caught.value)


def test_loopback_is_the_interface_of_its_address(machine: None) -> None:
    assert loopback() == "lo"


# Two hosts whose interfaces have different names.

HOSTS = {"left0": "10.98.7.1", "right7": "10.98.7.2"}
ONE_RANK = """
import os, sys
from strategies.backends import GlooBackend, connect_ranks, disconnect_ranks
from strategies.errors import ConfigError
try:
    world = connect_ranks(GlooBackend(timeout_s=60, interface=sys.argv[1]))
except ConfigError as error:
    sys.exit(str(error))
print(world.reduce([1.0])[0], os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
world.barrier()
disconnect_ranks()
"""


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Network namespaces with a cable between them."""
    names = [f"shardwright-{os.getpid()}-{end}" for end in HOSTS]
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = HOSTS
        ip("link", "add", first, "netns", names[0], "type", "veth", "peer", "name", second, "netns", names[1])
        for name, (end, address) in zip(names, HOSTS.items(), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


@pytest.mark.skipif(
    os.environ.get("SHARDWRIGHT_CLUSTER") != "all" or os.geteuid() != 0 or shutil.which("ip") is None,
    reason="makes network namespaces: SHARDWRIGHT_CLUSTER=all, root, ip (apt-get install iproute2)",
)
@pytest.mark.parametrize(("wanted", "meet"), [("^docker", True), ("left,right", False), ("left0", False)])
def test_hosts_with_other_names_meet_by_exclusion(two_hosts: list[str], wanted: str, meet: bool) -> None:
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": HOSTS["left0"],
        "MASTER_PORT": "29555",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    words = [sys.executable, "-c", ONE_RANK, wanted]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *words],
                    env={"PATH": os.environ["PATH"], **variables, "RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank, name in enumerate(two_hosts)
        ]
        said = [process.communicate(timeout=150) for process in started]
    if meet:
        assert [out.split() for out, _ in said] == [["2.0", end, f"={end}"] for end in HOSTS], said
    else:
        for _, err in said:
            assert f"interface='{wanted}' is not a network interface of this machine" in err.splitlines()[-1]
