"""How a training job is spread over machines: the seam, and one file per plugin."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points

from strategies.base import Strategy
from strategies.errors import ConfigError

__all__ = ["ENTRY_POINTS", "ConfigError", "Strategy", "built_in", "from_other_packages"]

ENTRY_POINTS = "shardwright.strategies"
_NOT_PLUGINS = {
    "base",
    "backends",
    "ec2",
    "efa",
    "efa_rules",
    "elastic",
    "errors",
    "interfaces",
    "launchers",
    "meeting",
    "smddp",
    "testing",
    "world",
}


def built_in() -> list[type[Strategy]]:
    """The strategies of this package: each concrete `Strategy` in a module of it."""
    found: list[type[Strategy]] = []
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_") or module.name in _NOT_PLUGINS:
            continue
        namespace = importlib.import_module(f"{__name__}.{module.name}")
        found += [
            value
            for value in vars(namespace).values()
            if inspect.isclass(value)
            and issubclass(value, Strategy)
            and not inspect.isabstract(value)
            and value.__module__ == namespace.__name__
        ]
    return found


def from_other_packages() -> dict[str, type[Strategy]]:
    """Strategies that installed packages announce in the entry-point group `shardwright.strategies`.

    Returns:
        Name (the word after `strategy=`) -> class.

    Raises:
        ConfigError: an announced plugin can't be imported, or isn't a strategy.
    """
    found: dict[str, type[Strategy]] = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            plugin = point.load()
        except Exception as error:
            raise ConfigError(
                f"Plugin: strategy {point.name!r} ({point.value}) can't be imported: {error}. "
                "Mend or uninstall that package."
            ) from error
        if not (inspect.isclass(plugin) and issubclass(plugin, Strategy)):
            raise ConfigError(
                f"Plugin: {point.name!r} ({point.value}) is not a subclass of strategies.base.Strategy. "
                "Mend or uninstall that package."
            )
        found[point.name] = plugin
    return found
