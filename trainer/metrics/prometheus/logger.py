"""The endpoint of each rank."""

from __future__ import annotations

import ipaddress
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.errors import ConfigError
from strategies.world import World
from trainer.metrics.base import AbstractLogger
from trainer.metrics.prometheus.collector import Collector
from trainer.metrics.prometheus.targets import Endpoint, TargetFile
from trainer.place import at_home

if TYPE_CHECKING:
    import threading
    from wsgiref.simple_server import WSGIServer

_MOST = 2**16 - 1


@dataclass(kw_only=True)
class PrometheusLogger(AbstractLogger):
    """Answers Prometheus on every rank, so that a rank that stands still or is slow can be seen.

    Answers from what was logged anyway: a scrape asks nothing of the device or of other ranks.
    """

    port: int = 9400
    """Of each machine's first rank; the next ones take the next ports. 0: any free port, as the target file says."""
    host: str = "127.0.0.1"
    """The address of this machine to listen at; 0.0.0.0: all of them, for everybody who can reach it."""
    targets: str | None = None
    """Folder for the file that lists the ranks' endpoints; null: prometheus in the run's folder."""

    every_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _MOST:
            raise ConfigError(
                f"PrometheusLogger: port={self.port} is not in 0 to {_MOST}. Try 9400 (logger.prometheus.port)."
            )
        try:
            self._host = ipaddress.ip_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError as error:
            raise ConfigError(
                f"PrometheusLogger: host={self.host!r} is not an address. Try 127.0.0.1, or 0.0.0.0 for all of this "
                "machine's (logger.prometheus.host)."
            ) from error
        if self.targets is not None and not self.targets.strip():
            raise ConfigError(
                "PrometheusLogger: targets is empty. Give a folder, or null for the run's own "
                "(logger.prometheus.targets)."
            )
        self._serving: tuple[WSGIServer, threading.Thread] | None = None
        self._collector: Collector | None = None
        self._file: TargetFile | None = None
        self._number = 0
        self._under_way = False

    def join(self, world: World, folder: Path) -> None:
        with world.together():
            self._number = self._port_of(world)
            self._collector = Collector(world, folder)
            self._serve()
        mine = Endpoint(host=platform.node(), address=self._address())
        everybody = [Endpoint(**each) for each in world.gather(mine.to_json())]
        with world.together():
            folder_of_file = folder / "prometheus" if self.targets is None else at_home(self.targets)
            name = "targets" if self.targets is None else folder.name
            self._file = TargetFile.of(everybody, world, folder_of_file, name, loopback=self._host.is_loopback)
            self._file.write()

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        if self._collector is not None and self._serving is None:  # after a rollback
            self._serve()

    def advance(self, step: int) -> None:
        if self._collector is not None:
            self._collector.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._collector is not None:
            self._collector.log(metrics)

    def event(self, name: str, entries: Mapping[str, Any]) -> None:
        if self._collector is None:
            return
        match name:
            case "start":
                self._under_way = True
                self._collector.start(entries)
            case "saving":
                self._collector.saving(now=entries["now"])
            case "checkpoint":
                self._collector.saved(entries)
            case "rollback":
                self._collector.rolled_back(entries["step"])
            case "end" if entries["outcome"] in ("finished", "stopped"):
                self._withdraw()

    def text(self, step: int, name: str, text: str) -> None:
        """Numbers only."""

    def close(self) -> None:
        if self._serving is not None:
            (server, thread), self._serving = self._serving, None
            server.shutdown()
            server.server_close()
            thread.join()
        if not self._under_way:
            self._withdraw()

    def address(self) -> str:
        if self._file is None:
            return ""
        more = "" if self._file.num_ranks == 1 else f" and {self._file.num_ranks - 1} more"
        return f"http://{self._address()}/metrics{more}, listed in {self._file.path}"

    def _port_of(self, world: World) -> int:
        if self.port == 0:
            return 0
        last = self.port + world.local_size - 1
        if last > _MOST:
            raise ConfigError(
                f"PrometheusLogger: port={self.port} leaves no ports for {world.local_size} ranks, the last would need "
                f"{last}. Choose one up to {_MOST - world.local_size + 1} (logger.prometheus.port)."
            )
        return self.port + world.local_rank

    def _serve(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ConfigError(
                "PrometheusLogger: the package prometheus-client isn't installed. "
                "pip install 'shardwright[prometheus]', or choose another logger (logger)."
            ) from error
        assert self._collector is not None
        registry = CollectorRegistry()
        registry.register(self._collector)
        try:
            self._serving = start_http_server(self._number, str(self._host), registry)
        except OSError as error:
            raise ConfigError(
                f"PrometheusLogger: {self._host} port {self._number} of {platform.node()} can't be listened at: "
                f"{error.strerror}. Choose another, or port=0 for any free one (logger.prometheus.port, "
                "logger.prometheus.host)."
            ) from error
        self._number = self._serving[0].server_port  # also where the system chose it, for the next time

    def _address(self) -> str:
        """Where a scrape finds this rank."""
        host = platform.node() if self._host.is_unspecified else str(self._host)
        return f"[{host}]:{self._number}" if ":" in host else f"{host}:{self._number}"

    def _withdraw(self) -> None:
        if self._file is not None:
            self._file.remove()
