"""From one command to processes: a launcher takes a training job and starts it here or somewhere else."""

from trainer.launch.base import ArrayLauncher, LaunchedJob, Launcher, LaunchJob, State, Status
from trainer.launch.batch import BatchLauncher
from trainer.launch.kubernetes import KubernetesLauncher
from trainer.launch.local import LocalLauncher
from trainer.launch.sagemaker import SageMakerLauncher
from trainer.launch.slurm import SlurmLauncher

SCHEMAS = (LocalLauncher, SageMakerLauncher, SlurmLauncher, KubernetesLauncher, BatchLauncher)

__all__ = [
    "SCHEMAS",
    "ArrayLauncher",
    "BatchLauncher",
    "KubernetesLauncher",
    "LaunchJob",
    "LaunchedJob",
    "Launcher",
    "LocalLauncher",
    "SageMakerLauncher",
    "SlurmLauncher",
    "State",
    "Status",
]
