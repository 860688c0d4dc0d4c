"""Loggers: what reaches TensorBoard, CSV, W&B and MLflow, over restarts and failures.

W&B and MLflow are stand-ins here, which record how they are called; the calls were made against the real ones too.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from strategies.errors import ConfigError
from trainer.metrics import SCHEMAS
from trainer.metrics.base import AbstractLogger
from trainer.metrics.csv_logger import CSVLogger
from trainer.metrics.loggers import Loggers
from trainer.metrics.mlflow_logger import MLflowLogger
from trainer.metrics.tensorboard_logger import TensorBoardLogger
from trainer.metrics.wandb_logger import WandbLogger, WandbMode

CONFIG = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "name": "x" * 600}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# TensorBoard.


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_numbers_and_texts_read_back(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    logger.open(tmp_path, CONFIG, 0)
    logger.log(10, {"loss": 2.5, "lr": 0.1})
    logger.log(20, {"loss": math.nan})
    logger.text(20, "samples", "def f(): ...")
    logger.close()
    logger.close()
    found = events(tmp_path / "tensorboard")
    assert found.Scalars("loss")[0].value == 2.5
    assert [event.step for event in found.Scalars("loss")] == [10, 20]
    texts = {
        tag: found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in ("samples/text_summary", "config/text_summary")
    }
    assert texts["samples/text_summary"] == "def f(): ..."
    assert '"lr": 0.1' in texts["config/text_summary"]


def test_tensorboard_resumed_drops_what_came_after(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    logger.open(tmp_path, {}, 0)
    for step in (1, 2, 3, 4):
        logger.log(step, {"loss": float(step)})
    logger.close()
    logger.open(tmp_path, {}, 2)
    logger.log(3, {"loss": 30.0})
    logger.close()
    assert [(event.step, event.value) for event in events(tmp_path / "tensorboard").Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


# CSV.


def test_csv_evaluation_shares_the_row_of_its_step(tmp_path: Path) -> None:
    logger = CSVLogger()
    logger.open(tmp_path, {}, 0)
    logger.log(1, {"loss": 2.0})
    logger.log(2, {"loss": 1.5})
    logger.log(2, {"val_loss": 1.75})
    logger.log(3, {"loss": 1.0})
    logger.log(3, {"loss": 1.0, "val_loss": 1.25})
    logger.text(3, "samples", "no place for this")
    logger.close()
    assert table(tmp_path / "metrics.csv") == [
        {"step": "1", "loss": "2.0", "val_loss": ""},
        {"step": "2", "loss": "1.5", "val_loss": "1.75"},
        {"step": "3", "loss": "1.0", "val_loss": "1.25"},
    ]


def test_csv_resumed_drops_later_rows_and_goes_on(tmp_path: Path) -> None:
    logger = CSVLogger()
    logger.open(tmp_path, {}, 0)
    for step in (1, 2, 3):
        logger.log(step, {"loss": float(step)})
    logger.close()
    logger = CSVLogger()
    logger.open(tmp_path, {}, 2)
    logger.log(2, {"val_loss": 9.0})
    logger.log(3, {"loss": 30.0})
    logger.close()
    assert [(row["step"], row["loss"], row["val_loss"]) for row in table(tmp_path / "metrics.csv")] == [
        ("1", "1.0", ""),
        ("2", "2.0", "9.0"),
        ("3", "30.0", ""),
    ]


def test_csv_rows_reach_the_file_at_once(tmp_path: Path) -> None:
    logger = CSVLogger()
    logger.open(tmp_path, {}, 0)
    logger.log(1, {"loss": 2.0})
    assert len(table(tmp_path / "metrics.csv")) == 1
    logger.close()


def test_csv_unwritable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CSVLogger: .*logger\.csv\.file"):
        CSVLogger(file="missing/folder.csv").open(tmp_path, {}, 0)


# W&B.


@dataclass
class StandInRun:
    id: str
    dir: str
    url: str = "https://stand.in/run"
    logged: list[Mapping[str, Any]] = field(default_factory=list)
    defined: list[tuple[str, str | None]] = field(default_factory=list)
    finished: int = 0

    def log(self, values: Mapping[str, Any]) -> None:
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the module wandb."""
    module: Any = ModuleType("wandb")
    module.calls, module.runs = [], []

    def init(**options: Any) -> StandInRun:
        module.calls.append(options)
        run = StandInRun(options["id"] or f"new{len(module.calls)}", f"{options['dir']}/wandb/offline-1/files")
        module.runs.append(run)
        return run

    module.init = init
    module.Settings = lambda **options: options
    module.Table = lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_resumed_goes_on_in_the_same_run(wandb: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    logger = WandbLogger(project="p", tags=["a"])
    logger.open(folder, CONFIG, 0)
    logger.log(1, {"loss": 2.0})
    logger.text(1, "samples", "def f")
    assert logger.address() == "https://stand.in/run"
    logger.close()
    logger.close()
    WandbLogger(project="p").open(folder, CONFIG, 1)
    first, second = wandb.calls
    assert (first["project"], first["name"], first["tags"], first["mode"]) == ("p", "mine", ["a"], "online")
    assert (first["id"], first["resume"], first["config"]) == (None, None, CONFIG)
    assert first["settings"] == {"console": "off", "silent": True}
    assert (second["id"], second["resume"]) == ("new1", "allow")
    run = wandb.runs[0]
    assert run.logged == [
        {"loss": 2.0, "step": 1},
        {"samples": ("table", ["step", "text"], [[1, "def f"]]), "step": 1},
    ]
    assert run.defined == [("step", None), ("*", "step")]
    assert run.finished == 1


def test_wandb_fresh_run_in_an_old_folder_is_a_new_run(wandb: Any, tmp_path: Path) -> None:
    for _ in range(2):
        WandbLogger().open(tmp_path, {}, 0)
    assert [call["id"] for call in wandb.calls] == [None, None]
    assert (tmp_path / "wandb_run_id").read_text() == "new2"


def test_wandb_offline_says_how_to_send_it(wandb: Any, tmp_path: Path) -> None:
    logger = WandbLogger(mode=WandbMode.offline)
    logger.open(tmp_path, {}, 0)
    assert wandb.calls[0]["mode"] == "offline"
    assert logger.address() == f"wandb sync {tmp_path}/wandb/offline-1"


def test_wandb_that_does_not_start_is_one_line(wandb: Any, tmp_path: Path) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("no key\nanywhere")

    wandb.init = init
    with pytest.raises(ConfigError, match=r"^WandbLogger: can't start a run: no key anywhere\. .*mode=offline"):
        WandbLogger().open(tmp_path, {}, 0)


# MLflow.


class StandInClient:
    """A stand-in for mlflow.MlflowClient; `server` outlives it."""

    def __init__(self, server: Any, tracking_uri: str) -> None:
        self.server = server
        server.uris.append(tracking_uri)

    def get_experiment_by_name(self, name: str) -> Any:
        return self.server.experiments.get(name)

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self.server.experiments[name] = SimpleNamespace(experiment_id="7", artifact_location=artifact_location)
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        self.server.created.append((experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.server.created)}"))

    def update_run(self, run_id: str, status: str) -> None:
        self.server.status.append((run_id, status))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.server.status.append((run_id, status))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.server.logged += [(run_id, *metric) for metric in metrics]
        self.server.params |= dict(params)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.server.texts.append((run_id, text, artifact_file))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the module mlflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module: Any = ModuleType("mlflow")
    module.server = SimpleNamespace(uris=[], experiments={}, created=[], status=[], logged=[], params={}, texts=[])
    module.MlflowClient = lambda tracking_uri: StandInClient(module.server, tracking_uri)
    module.entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step), Param=lambda key, value: (key, value)
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_mlflow_resumed_goes_on_in_the_same_run(mlflow: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    logger = MLflowLogger()
    logger.open(folder, CONFIG, 0)
    logger.log(1, {"loss": 2.0})
    logger.text(1, "samples", "def f")
    logger.close()
    logger.close()
    again = MLflowLogger()
    again.open(folder, CONFIG, 1)
    again.log(2, {"loss": 1.0})
    again.close()
    server = mlflow.server
    assert server.uris == [f"sqlite:///{folder / 'mlflow.db'}"] * 2
    assert server.experiments["shardwright"].artifact_location == (folder / "mlflow").as_uri()
    assert server.created == [("7", "mine")]
    assert server.status == [("run1", "FINISHED"), ("run1", "RUNNING"), ("run1", "FINISHED")]
    assert server.logged == [("run1", "loss", 2.0, 1), ("run1", "loss", 1.0, 2)]
    assert server.texts == [("run1", "def f", "samples/step-00000001.txt")]
    assert server.params == {"optimizer.lr": "0.1", "optimizer.betas": "[0.9, 0.95]", "name": "x" * 500}


def test_mlflow_server_comes_from_the_key_before_the_environment(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    for uri in (None, "http://key"):
        logger = MLflowLogger(tracking_uri=uri)
        logger.open(tmp_path, {}, 0)
    assert mlflow.server.uris == ["http://environment", "http://key"]
    assert logger.address() == "http://key"
    assert mlflow.server.experiments["shardwright"].artifact_location is None


@pytest.mark.parametrize(("logger", "package"), [(WandbLogger(), "wandb"), (MLflowLogger(), "mlflow")])
def test_logger_without_its_package_says_how_to_install_it(
    logger: AbstractLogger, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} isn't installed\. pip install 'shardwright\[loggers\]'"):
        logger.open(tmp_path, {}, 0)


# All of them.


@dataclass(kw_only=True)
class Flaky(AbstractLogger):
    """Fails when told to."""

    def __post_init__(self) -> None:
        self.broken = True
        self.calls: list[str] = []

    def open(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.calls.append(f"open {step}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"log {step}")
        if self.broken:
            raise OSError("disk full")

    def text(self, step: int, name: str, text: str) -> None:
        self.calls.append(f"text {step}")

    def close(self) -> None:
        self.calls.append("close")


def test_loggers_failing_one_is_told_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    flaky = Flaky()
    loggers = Loggers({"flaky": flaky, "csv": CSVLogger()}, said.append)
    loggers.open(tmp_path, {}, 0)
    loggers.log(1, {"loss": 1.0})
    loggers.log(2, {"loss": 1.0})
    flaky.broken = False
    for step in (3, 4, 5):
        loggers.log(step, {"loss": 1.0})
    loggers.close()
    assert said == [
        f"csv: {tmp_path / 'metrics.csv'}",
        "logger flaky failed, training goes on: OSError: disk full",
    ]
    assert flaky.calls == ["open 0", *(f"log {step}" for step in (1, 2, 3, 4, 5)), "close"]
    assert len(table(tmp_path / "metrics.csv")) == 5


def test_loggers_one_that_always_fails_is_left_alone_but_closed(tmp_path: Path) -> None:
    said: list[str] = []
    flaky = Flaky()
    loggers = Loggers({"flaky": flaky}, said.append)
    loggers.open(tmp_path, {}, 0)
    for step in range(1, 8):
        loggers.log(step, {})
    loggers.close()
    assert flaky.calls == ["open 0", "log 1", "log 2", "log 3", "close"]
    assert said[-1] == "logger flaky failed 3 times in a row and is left alone"


def test_loggers_rewind_opens_each_again_at_the_step(tmp_path: Path) -> None:
    flaky = Flaky()
    flaky.broken = False
    loggers = Loggers({"flaky": flaky}, print)
    loggers.open(tmp_path, {}, 0)
    loggers.rewind(5)
    loggers.text(6, "samples", "x")
    assert flaky.calls == ["open 0", "close", "open 5", "text 6"]


@pytest.mark.parametrize("cls", SCHEMAS)
def test_logger_before_open_and_after_close_does_nothing(cls: type[AbstractLogger]) -> None:
    logger = cls()
    logger.log(1, {"loss": 1.0})
    logger.text(1, "samples", "x")
    logger.close()
    logger.close()
