"""Hosts on this machine: network namespaces on one switch, each with a name, an address and a link of known speed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

on_request = pytest.mark.skipif(
    os.environ.get("SHARDWRIGHT_CLUSTER") != "all",
    reason="network namespaces and link shaping, as root: set SHARDWRIGHT_CLUSTER=all",
)


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of them."""

    name: str
    address: str
    namespace: str
    switch: str
    """The namespace of all hosts' switch."""
    port: str
    """Of the switch, to this host."""

    def words(self, *command: str) -> list[str]:
        """The command line that runs `command` there, under the host's own name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *named, *command]

    def shape(self, rate: str) -> None:
        """Let it send no faster than `rate`, such as `1gbit`."""
        limits = ["rate", rate, "burst", "256kb", "latency", "50ms"]
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limits)

    def shape_receiving(self, rate: str) -> None:
        """Let the others send it no more than `rate`, by its port of the switch."""
        limits = ["rate", rate, "burst", "256kb", "latency", "50ms"]
        _run("ip", "netns", "exec", self.switch, "tc", "qdisc", "replace", "dev", self.port, "root", "tbf", *limits)

    @property
    def received_bytes(self) -> int:
        """Over its link, so far."""
        path = "/sys/class/net/eth0/statistics/rx_bytes"
        return int(subprocess.run(self.words("cat", path), check=True, capture_output=True, text=True).stdout)

    def link(self, state: str) -> None:
        """Take its link `up` or `down`."""
        _run("ip", "netns", "exec", self.namespace, "ip", "link", "set", "eth0", state)


@contextlib.contextmanager
def hosts(number: int = 2, *, rate: str | None = None, resolve: bool = True) -> Iterator[list[Host]]:
    """So many hosts, until the end of the block.

    Args:
        number: of hosts.
        rate: that each may send; None: as fast as the machine is.
        resolve: each finds the others by name.
    """
    missing = [program for program in ("ip", "tc", "unshare", "hostname") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and on Debian the packages iproute2, util-linux and hostname ({missing})")
    mark = f"sw{os.getpid()}"
    switch = f"{mark}-switch"
    found = [
        Host(
            name=f"algo-{each}",
            address=f"10.98.0.{each}",
            namespace=f"{mark}-{each}",
            switch=switch,
            port=f"{mark}p{each}",
        )
        for each in range(1, number + 1)
    ]
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in found:
            _run("ip", "netns", "add", host.namespace)
            _connect(host)
            if rate is not None:
                host.shape(rate)
            _write_hosts(host, found if resolve else [host])
        yield found
    finally:
        for namespace in (*(host.namespace for host in found), switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _connect(host: Host) -> None:
    inside, switch = ["ip", "-n", host.namespace], ["ip", "-n", host.switch]
    _run(*switch, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _run(*switch, "link", "set", host.port, "master", "br0", "up")
    _run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _run(*inside, "link", "set", "eth0", "up")
    _run(*inside, "link", "set", "lo", "up")


def _write_hosts(host: Host, known: Sequence[Host]) -> None:
    folder = Path("/etc/netns") / host.namespace
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["127.0.0.1 localhost", *(f"{each.address} {each.name}" for each in known)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
