"""What a person sees of a run: numbers in files and services, the display, the logs, plots and the summary."""

from __future__ import annotations

from trainer.metrics.csv_logger import CSVLogger
from trainer.metrics.mlflow_logger import MLflowLogger
from trainer.metrics.prometheus.logger import PrometheusLogger
from trainer.metrics.tensorboard_logger import TensorBoardLogger
from trainer.metrics.wandb_logger import WandbLogger

SCHEMAS: tuple[type, ...] = (TensorBoardLogger, CSVLogger, WandbLogger, MLflowLogger, PrometheusLogger)
