"""The file by which Prometheus finds the ranks of a run (`file_sd_configs`)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from strategies.errors import ConfigError
from strategies.world import World


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Of one rank."""

    host: str
    """The machine's name."""
    address: str
    """As a scrape needs it, such as 127.0.0.1:9400."""

    def to_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)


@dataclass(kw_only=True)
class TargetFile:
    """There while a run goes on, and after one that failed or was killed: those are missed, not forgotten."""

    path: Path
    addresses: list[str]
    """Those that it lists; none: another rank writes it."""
    num_ranks: int

    @classmethod
    def of(cls, endpoints: Sequence[Endpoint], world: World, folder: Path, name: str, *, loopback: bool) -> Self:
        """What this rank has to write.

        Where the ranks of several machines listen at 127.0.0.1, each machine has a file of its own, for a Prometheus
        or an agent that runs there.

        Args:
            endpoints: of all ranks, in their order.
            world: who takes part.
            folder: for the file.
            name: of the file, without its ending.
            loopback: only a machine itself reaches its ranks.
        """
        mine = endpoints[world.rank].host
        if loopback and len({each.host for each in endpoints}) > 1:
            name, leads = f"{name}-{mine}", world.local_rank == 0
            endpoints = [each for each in endpoints if each.host == mine]
        else:
            leads = world.rank == 0
        addresses = [each.address for each in endpoints] if leads else []
        return cls(path=folder / f"{name}.json", addresses=addresses, num_ranks=world.size)

    def write(self) -> None:
        """In one go, since Prometheus reads it at any moment.

        Raises:
            ConfigError: it can't be written.
        """
        if not self.addresses:
            return
        temporary = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps([{"targets": self.addresses, "labels": {}}]) + "\n")
            temporary.replace(self.path)
        except OSError as error:
            raise ConfigError(
                f"PrometheusLogger: {self.path} can't be written: {error.strerror}. Choose another folder "
                "(logger.prometheus.targets)."
            ) from error

    def remove(self) -> None:
        """Nothing is to be scraped any more, and nobody to be told that it doesn't answer."""
        if self.addresses:
            with contextlib.suppress(OSError):  # it isn't there, or its folder is gone
                self.path.unlink()
