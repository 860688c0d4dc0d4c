"""From one command to processes: a launcher takes a training job and starts it here or somewhere else."""

from trainer.launch.base import LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.launch.local import LocalLauncher
from trainer.launch.sagemaker import SageMakerLauncher

SCHEMAS = (LocalLauncher, SageMakerLauncher)

__all__ = ["SCHEMAS", "LaunchJob", "LaunchedJob", "Launcher", "LocalLauncher", "SageMakerLauncher", "State", "Status"]
