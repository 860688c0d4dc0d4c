"""From one command to processes: a launcher takes a training job and starts it here or somewhere else."""

from trainer.launch.base import LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.launch.local import LocalLauncher

SCHEMAS = (LocalLauncher,)

__all__ = ["SCHEMAS", "LaunchJob", "LaunchedJob", "Launcher", "LocalLauncher", "State", "Status"]
