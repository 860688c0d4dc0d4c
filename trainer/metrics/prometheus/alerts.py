"""The alert rules (`alerts.yml`, beside this file), with thresholds of one's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from strategies.errors import ConfigError, nearest

_FILE = Path(__file__).with_name("alerts.yml")
_ALERT = re.compile(r"^ +- alert: Shardwright(\w+)\n.*?^ +(?:[<>]) (?P<threshold>\S+)$", re.DOTALL | re.MULTILINE)


def alert_rules(thresholds: Mapping[str, float] | None = None) -> str:
    """A rule file of Prometheus.

    Args:
        thresholds: by the alert's name, with or without `Shardwright` before it, in place of what stands in the file.

    Raises:
        ConfigError: there is no such alert, or it has no threshold.
    """
    text = _FILE.read_text()
    spans = {}
    for rule in re.split(r"(?=^ +- alert: )", text, flags=re.MULTILINE)[1:]:
        if found := _ALERT.match(rule):
            begin = text.index(rule)
            spans[found.group(1)] = (begin + found.start("threshold"), begin + found.end("threshold"))
    wanted = {name.removeprefix("Shardwright"): value for name, value in (thresholds or {}).items()}
    for name in wanted:
        if name not in spans:
            raise ConfigError(
                f"monitoring: there is no alert {name!r} with a threshold. {nearest(name, spans)} (--threshold)"
            )
    for name, (begin, end) in sorted(spans.items(), key=lambda each: -each[1][0]):  # from the end: positions stay
        if name in wanted:
            text = f"{text[:begin]}{wanted[name]:g}{text[end:]}"
    return text
