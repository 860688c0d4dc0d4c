"""Names of the other hosts, and the interface over which they are met."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from strategies.interfaces import choose
from trainer.doctor.check import Asked, Check, differing, text_of
from trainer.doctor.findings import Finding, listed

_MOST_NAMES = 16
_SLOW_S = 1.0
_PATIENCE_S = 6.0


class NamesCheck(Check):
    """Whether this host can find the others by name, and how long that takes."""

    name = "names"

    def look(self, asked: Asked) -> dict[str, Any]:
        """Each host asks for the next few, so that all are asked for however many there are."""
        at = asked.hosts.index(asked.host)
        others = dict.fromkeys([*asked.hosts[at + 1 :], *asked.hosts[:at]])
        found: dict[str, Any] = {}

        def resolve(name: str) -> None:
            begun = time.perf_counter()
            try:
                socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                found[name] = time.perf_counter() - begun
            except OSError as error:
                found[name] = error.strerror or str(error)

        threads = [threading.Thread(target=resolve, args=[name], daemon=True) for name in list(others)[:_MOST_NAMES]]
        for thread in threads:
            thread.start()
        end = time.monotonic() + _PATIENCE_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return {name: found.get(name, f"no answer within {_PATIENCE_S:.0f} s") for name in list(others)[:_MOST_NAMES]}

    def judge(self, found: Any) -> list[Finding]:
        lost = {name: answer for name, answer in found.items() if isinstance(answer, str)}
        took = {name: answer for name, answer in found.items() if not isinstance(answer, str)}
        findings = []
        if lost:
            findings.append(
                self.warning(
                    listed([f"{name}: {answer}" for name, answer in lost.items()]),
                    "Give launchers addresses instead of names, or put the names into DNS or /etc/hosts",
                )
            )
        if slow := {name: took_s for name, took_s in took.items() if took_s > _SLOW_S}:
            findings.append(
                self.warning(
                    listed([f"{name} takes {took_s:.1f} s" for name, took_s in slow.items()]),
                    "Look at the name servers in /etc/resolv.conf: each connection asks them",
                )
            )
        if findings or not found:
            return findings
        return [self.ok(f"{len(took)} found, in {1e3 * max(took.values()):.0f} ms at most")]


class InterfacesCheck(Check):
    """Over which interface this host's ranks will be met, and what it is."""

    name = "interface"

    def look(self, asked: Asked) -> dict[str, Any]:
        import psutil

        chosen = None if asked.interface is None else choose(asked.interface)
        states = psutil.net_if_stats()
        interfaces = {
            name: {
                "addresses": [each.address for each in places if each.family in (socket.AF_INET, socket.AF_INET6)],
                "up": states[name].isup,
                "mtu": states[name].mtu,
                "mbit_per_s": _speed(name),
            }
            for name, places in psutil.net_if_addrs().items()
            if name in states
        }
        return {
            "interfaces": interfaces,
            "gloo": chosen.for_gloo() if chosen else os.environ.get("GLOO_SOCKET_IFNAME"),
            "nccl": chosen.for_nccl() if chosen else os.environ.get("NCCL_SOCKET_IFNAME"),
            "named": _addresses(socket.gethostname()),
            "route": None if asked.meeting is None else route(*asked.meeting),
            "hosts": len(asked.hosts),
        }

    def judge(self, found: Any) -> list[Finding]:
        interfaces = found["interfaces"]
        route = _owner(interfaces, found["route"])
        set_ = {variable: found[key] for key, variable in _VARIABLES.items() if found[key]}
        advice = "Choose the one between the hosts (backend.interface=" + (route or "NAME") + ")"
        for variable, given in set_.items():
            if variable == "GLOO_SOCKET_IFNAME" or given[0] not in "^=":
                missing = [name for name in given.split(",") if not any(each.startswith(name) for each in interfaces)]
                if missing:
                    return [self.failure(f"{variable}={given}, and there are {listed(sorted(interfaces))}", advice)]
        if found["hosts"] > 1 and not found["gloo"]:
            if found["named"] and all(ipaddress.ip_address(each).is_loopback for each in found["named"]):
                return [
                    self.failure(
                        f"this host's own name leads to {listed(found['named'])}, which is what Gloo tells the others",
                        advice,
                    )
                ]
            if not found["named"]:
                return [self.failure("this host's own name leads nowhere, and Gloo looks there", advice)]
        by = f" ({', '.join(f'{name}={value}' for name, value in set_.items())})" if set_ else ""
        name = next((given for given in set_.values() if given in interfaces), route)
        if name is None or name not in interfaces:
            return [self.ok(f"{listed([each for each in sorted(interfaces) if interfaces[each]['up']])}{by}")]
        chosen = interfaces[name]
        speed = f", {chosen['mbit_per_s']:,} Mbit/s" if chosen["mbit_per_s"] else ""
        if not chosen["up"]:
            return [self.failure(f"{name} is down", "ip link set up, or choose another (backend.interface)")]
        return [self.ok(f"{name}: {listed(chosen['addresses'][:1])}, MTU {chosen['mtu']:,}{speed}{by}")]

    def compare(self, hosts: Mapping[str, Any]) -> list[Finding]:
        found = []
        chosen = {}
        for host, each in hosts.items():
            name = each["gloo"] if each["gloo"] in each["interfaces"] else _owner(each["interfaces"], each["route"])
            chosen[host] = each["interfaces"].get(name or "", {})
        for key, what in (("mtu", "MTU"), ("mbit_per_s", "speed in Mbit/s")):
            if text := differing({host: each[key] for host, each in chosen.items() if each.get("up")}):
                found.append(self.warning(f"{what} differs: {text}", "Set it alike: large packets may be lost"))
        return found


_VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def _speed(name: str) -> int | None:
    """As its driver says; virtual ones don't."""
    text = text_of(f"/sys/class/net/{name}/speed")
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else None


def _addresses(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))


def route(address: str, port: int) -> str | None:
    """The address from which this host would send there, none being sent; None: it can't."""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
    except OSError:
        pass
    return None


def _owner(interfaces: Mapping[str, Any], address: str | None) -> str | None:
    return next((name for name, each in interfaces.items() if address in each["addresses"]), None)
