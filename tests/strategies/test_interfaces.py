"""Network interfaces by name, by what their names begin with, and by exclusion."""

from __future__ import annotations

import socket
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
