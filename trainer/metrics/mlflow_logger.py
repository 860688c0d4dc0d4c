"""MLflow."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from trainer.metrics.base import AbstractLogger

_ID_FILE = "mlflow_run_id"
_LONGEST_VALUE = 500
_PARAMS_PER_CALL = 100


@dataclass(kw_only=True)
class MLflowLogger(AbstractLogger):
    """Logs to an MLflow run, the same one after every restart.

    MLflow can't take numbers back: of steps that were done twice, because a start began at an earlier
    checkpoint, it keeps both values.
    """

    experiment: str = "shardwright"
    name: str | None = None
    """Of the run; null: the name of the run's folder."""
    tracking_uri: str | None = None
    """Server or store. null: the environment's MLFLOW_TRACKING_URI, else `mlflow.db` in the run's folder."""

    def __post_init__(self) -> None:
        self._mlflow: Any = None
        self._client: Any = None
        self._id = ""
        self._uri = ""

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ConfigError(
                "MLflowLogger: the package mlflow isn't installed. "
                "pip install 'shardwright[loggers]', or choose another logger (logger)."
            ) from error
        self._mlflow = mlflow
        local = f"sqlite:///{folder / 'mlflow.db'}"
        self._uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        try:
            client = mlflow.MlflowClient(tracking_uri=self._uri)
            self._id = self._begin(client, folder, config, step)
        except Exception as error:
            raise ConfigError(
                f"MLflowLogger: can't start a run at {self._uri}: {' '.join(str(error).split())}. "
                "Give the address of a server that is up, or null for a file (logger.mlflow.tracking_uri)."
            ) from error
        self._client = client

    def _begin(self, client: Any, folder: Path, config: Mapping[str, Any], step: int) -> str:
        kept = folder / _ID_FILE
        if step > 0 and kept.is_file():
            run_id = kept.read_text().strip()
            client.update_run(run_id, status="RUNNING")
            return run_id
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            number = experiment.experiment_id
        else:
            local = self._uri.startswith("sqlite:")
            place = (folder / "mlflow").absolute().as_uri() if local else None
            number = client.create_experiment(self.experiment, artifact_location=place)
        run = client.create_run(number, run_name=self.name or folder.name)
        run_id = str(run.info.run_id)
        kept.write_text(run_id)
        params = [self._mlflow.entities.Param(key, value) for key, value in _leaves(config)]
        for begin in range(0, len(params), _PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[begin : begin + _PARAMS_PER_CALL])
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._client is not None:
            now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
            batch = [metric(name, float(value), now, step) for name, value in metrics.items()]
            self._client.log_batch(self._id, metrics=batch)

    def text(self, step: int, name: str, text: str) -> None:
        if self._client is not None:
            self._client.log_text(self._id, text, f"{name}/step-{step:08d}.txt")

    def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self._id, status="FINISHED")

    def address(self) -> str:
        if self._uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self._uri}"
        return self._uri


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        text = tree if isinstance(tree, str) else json.dumps(tree, default=str)
        yield prefix, text[:_LONGEST_VALUE]
