"""NCCL over AWS's Elastic Fabric Adapter: what the installed versions need is set, and nothing else; never over TCP."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from strategies import ec2
from strategies.backends import Backend, gpu_of
from strategies.efa_rules import Verdict, judge
from strategies.errors import ConfigError
from strategies.world import Launch

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HERE, _NOT_HERE = "EFA", "TCP"


@dataclass(kw_only=True)
class EFABackend(Backend):
    """NCCL over EFA, one GPU for each rank; fails where EFA can't be used.

    Raises:
        ConfigError: `env` holds something that is no variable.
    """

    allow_tcp: bool = False
    """Go on over TCP, on all machines, where one of them has no EFA; it is said, and many times slower."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables for NCCL, its plugin and libfabric that are meant as they are; they win over the environment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.env.items():
            if not _NAME.fullmatch(name) or "\0" in value:
                raise ConfigError(
                    f"EFABackend: {name!r} in env is no name of a variable, or its value can't be one's. "
                    "Write them as NCCL_DEBUG: INFO (backend.env)."
                )
            if name.startswith("LD_"):
                raise ConfigError(
                    f"EFABackend: {name} in env comes too late, the loader reads it when a process starts. "
                    "Set it in the environment of the launcher (backend.env)."
                )
        self._verdict = Verdict()
        self._missing = ""

    def torch_name(self) -> str:
        return "nccl"

    def device(self, launch: Launch) -> torch.device:
        """Looks at EFA first: no GPU is touched, and nothing changed, on a machine without it."""
        variables = {**os.environ, **self.env}
        machine = ec2.look(variables)
        self._missing = machine.no_devices or machine.no_plugin
        if self._missing and not self.allow_tcp:
            raise ConfigError(f"EFABackend: {self._missing}, or allow TCP (backend.allow_tcp=true).")
        self._verdict = judge(machine, os.environ, self.env, allow_tcp=self.allow_tcp)
        if machine.plugin_word is not None:
            self._verdict.changes["NCCL_NET_PLUGIN"] = machine.plugin_word
            self._verdict.said.append(f"NCCL_NET_PLUGIN={machine.plugin_word} is set: there is no {ec2.PLUGIN} here")
        self._verdict.said.insert(0, machine.describe())
        return gpu_of(self, launch)

    def settle(self, exchange: Callable[[str], list[str]]) -> list[str]:
        if self.allow_tcp:
            answers = exchange(_NOT_HERE if self._missing else _HERE)
            if _NOT_HERE in answers:
                return self._over_tcp(answers.index(_NOT_HERE))
        for name, value in self._verdict.changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        return [f"EFA: {line}" for line in self._verdict.said]

    def _over_tcp(self, rank: int) -> list[str]:
        """All of them: two machines that take different networks would not meet."""
        os.environ.update(self.env)
        os.environ["NCCL_NET"] = "Socket"
        reason = f": {self._missing}" if self._missing else ""
        return [f"EFA: rank {rank} has none{reason}; all ranks go over TCP, as backend.allow_tcp=true allows"]
