"""Write what Prometheus and Grafana need to watch runs."""

from __future__ import annotations

import contextlib
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.commands import Parser

_TARGETS = "targets"


def parser() -> Parser:
    """`shardwright monitoring`'s own options."""
    found = Parser(
        "monitoring",
        "Write a configuration of Prometheus, the alert rules and a Grafana dashboard, for runs that were started with "
        "logger=[prometheus].",
    )
    found.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    found.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN",
        help="a run's folder to watch, such as runs/first; others are watched that write their targets into "
        f"FOLDER/{_TARGETS} (logger.prometheus.targets)",
    )  # fmt: skip
    found.add_argument(
        "--threshold", action="append", default=[], metavar="ALERT=NUMBER",
        help="of an alert, such as RunStalled=600 or CheckpointTooOld=3600; may be given several times",
    )  # fmt: skip
    found.add_argument("--force", action="store_true", help="write over files that were changed")
    return found


def main(options: Namespace) -> int:
    """Write the files, and say what to do with them."""
    from strategies.errors import ConfigError
    from trainer.metrics.prometheus.alerts import alert_rules
    from trainer.metrics.prometheus.dashboard import dashboard
    from trainer.place import at_home

    folder: Path = at_home(options.folder).absolute()
    files = {
        "alerts.yml": alert_rules(_thresholds(options.threshold)),
        "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        "prometheus.yml": _configuration(folder, options.runs),
    }
    for name, text in files.items():
        path = folder / name
        if path.is_file() and path.read_text() != text and not options.force:
            raise ConfigError(
                f"monitoring: {path} is there already and says something else. Choose another folder, or write over it "
                "(--force)."
            )
    try:
        (folder / _TARGETS).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise ConfigError(
            f"monitoring: {folder} can't be written: {error.strerror}. Choose another (FOLDER)."
        ) from error
    print(
        f"1. Start runs with: logger=[tensorboard,prometheus] logger.prometheus.targets={folder / _TARGETS}\n"
        f"2. prometheus --config.file={folder / 'prometheus.yml'} --web.listen-address=127.0.0.1:9090 "
        f"--storage.tsdb.path={folder / 'data'}\n"
        f"3. In Grafana: Dashboards, New, Import, {folder / 'dashboard.json'}; the data source is http://127.0.0.1:9090"
    )
    return 0


def _thresholds(words: Sequence[str]) -> dict[str, float]:
    from strategies.errors import ConfigError

    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition("=")
        with contextlib.suppress(ValueError):
            found[name] = float(number)
        if not math.isfinite(found.get(name, math.nan)):
            raise ConfigError(f"monitoring: --threshold {word} is no ALERT=NUMBER. Write RunStalled=600 (--threshold).")
    return found


def _configuration(folder: Path, runs: Sequence[Path]) -> str:
    import yaml

    from trainer.place import at_home

    lists = [folder / _TARGETS, *(at_home(run).absolute() / "prometheus" for run in dict.fromkeys(runs))]
    job: dict[str, Any] = {
        "job_name": "shardwright",
        "file_sd_configs": [{"files": [str(each / "*.json") for each in lists], "refresh_interval": "30s"}],
    }
    found = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [job],
    }
    return str(yaml.safe_dump(found, sort_keys=False))
