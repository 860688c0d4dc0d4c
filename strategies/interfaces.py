"""Which network interfaces the ranks' own connections take: names as NCCL writes them, for Gloo too."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from strategies.errors import ConfigError


@dataclass(frozen=True)
class Interfaces:
    """The interfaces of this machine that a choice comes to."""

    names: tuple[str, ...]
    listed: bool
    """They were named one by one, so every machine has as many."""

    def for_nccl(self) -> str:
        """For NCCL_SOCKET_IFNAME: these and no others that begin alike."""
        return "=" + ",".join(self.names)

    def for_gloo(self) -> str:
        """For GLOO_SOCKET_IFNAME, which takes whole names; ranks with different numbers of them would never meet."""
        return ",".join(self.names if self.listed else self.names[:1])


def choose(wanted: str) -> Interfaces:
    """What `wanted` comes to on this machine.

    Args:
        wanted: `eth0`; `eth0,eth1`; `eth`, all that begin so; `=eth0`, that one alone; `^docker,veth`, all others that
            are up, loopback left out; `^=docker0`. Machines whose interfaces have different names take one of the
            latter forms.

    Raises:
        ConfigError: it comes to nothing here.
    """
    import psutil

    internet = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs()
    known = [name for name, places in found.items() if any(place.family in internet for place in places)]
    excluding, rest = wanted.startswith("^"), wanted.removeprefix("^")
    exact, words = rest.startswith("="), rest.removeprefix("=").split(",")
    if not all(words):
        raise ConfigError(
            f"Backend: interface={wanted!r} has an empty name. "
            "Write eth0, eth0,eth1 or ^docker,veth (backend.interface)."
        )
    if excluding:
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        loopback = {name for name in known if any(place.address in ("127.0.0.1", "::1") for place in found[name])}
        hit = {name for word in words for name in _matching(word, known, exact)}
        names = [name for name in known if name in up - loopback - hit]
        if not names:
            raise ConfigError(
                f"Backend: interface={wanted!r} leaves none of this machine's network interfaces that are up, loopback "
                f"aside. It has {', '.join(sorted(known))} (backend.interface)."
            )
        return Interfaces(tuple(names), listed=False)
    names = []
    for word in words:
        these = [word] if word in known else _matching(word, known, exact)
        if not these:
            raise ConfigError(
                f"Backend: interface={wanted!r} is not a network interface of this machine that has an "
                f"address. It has {', '.join(sorted(known))} (backend.interface)."
            )
        names += [name for name in these if name not in names]
    return Interfaces(tuple(names), listed=all(word in known for word in words))


def _matching(word: str, known: list[str], exact: bool) -> list[str]:
    return [name for name in known if (name == word if exact else name.startswith(word))]


def loopback() -> str | None:
    """The interface of 127.0.0.1, if it is up."""
    import psutil

    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == "127.0.0.1" for entry in addresses) and name in states and states[name].isup:
            return str(name)
    return None
