"""SageMaker's own data parallel library as a backend: its import, its rules, its refusals."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist

from strategies import ec2
from strategies.backends import Backend, gpu_of
from strategies.errors import ConfigError
from strategies.world import Launch


@dataclass(kw_only=True)
class SMDDPBackend(Backend):
    """SageMaker's data parallel library: its all-gather between P4d machines, and NCCL for all else.

    Raises:
        ConfigError: a buffer's size is out of range.
    """

    scratch_bytes: int | None = None
    """Scratch buffer of an all-gather; null: the library's own size, 16 MiB."""
    sort_bytes: int | None = None
    """Buffer in which what was gathered is put in order; null: the library's own size, 128 MiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in _BUFFERS:
            if (given := getattr(self, key)) is not None:
                _refuse_size(key, str(given))

    def torch_name(self) -> str:
        return "smddp"

    def refuse_compiling(self) -> None:
        raise ConfigError(
            "SMDDPBackend: compile=true can't go with backend=smddp, whose makers don't say that it works with "
            "torch.compile. Use compile=false or backend=nccl (compile, backend)."
        )

    def device(self, launch: Launch) -> torch.device:
        kind = ec2.instance_type()
        if kind is not None and kind not in _WITH_SMDDP:
            raise ConfigError(
                f"SMDDPBackend: backend=smddp is for {' and '.join(_WITH_SMDDP)}, and this is {kind}. {_versions()}"
            )
        variables = os.environ
        by_mpi = [name for name in _ITS_MPIRUN if name in variables]
        if by_mpi and variables.get(_SHARDED, "").lower() != "true":
            raise ConfigError(
                f"SMDDPBackend: started by SageMaker's mpirun ({by_mpi[0]}), the library reduces gradients itself and "
                "allows no process group beside its own, and checkpoints need one. Start with torchrun, or set "
                f"{_SHARDED}=true for its all-gather alone (backend)."
            )
        self._set_buffers()
        try:
            importlib.import_module("smdistributed.dataparallel.torch.torch_smddp")
        except Exception as error:  # it also raises what it likes on a machine that it doesn't support
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(f"SMDDPBackend: its library can't be imported: {reason}. {_versions()}") from error
        if "cuda" not in dist.Backend.backend_capability.get(self.torch_name(), ["cuda"]):
            return torch.device("cpu")  # says what has registered itself under that name
        return gpu_of(self, launch)

    def _set_buffers(self) -> None:
        """The library reads them from the environment, where the user may have put them too."""
        for key, variable in _BUFFERS.items():
            given, outside = getattr(self, key), os.environ.get(variable)
            if outside is not None:
                _refuse_size(key, outside)
            if given is not None and outside not in (None, str(given)):
                raise ConfigError(
                    f"SMDDPBackend: {key}={given}, and the environment has {variable}={outside}. "
                    f"Leave one of them out (backend.{key})."
                )
            if given is not None:
                os.environ[variable] = str(given)


_WITH_SMDDP = ("p4d.24xlarge", "p4de.24xlarge")
_BUFFERS = {
    "scratch_bytes": "SMDDP_AG_SCRATCH_BUFFER_SIZE_BYTES",
    "sort_bytes": "SMDDP_AG_SORT_BUFFER_SIZE_BYTES",
}
_PAGE = 8192
_ITS_MPIRUN = ("SMDATAPARALLEL_USE_SINGLENODE", "SMDATAPARALLEL_USE_HOMOGENEOUS")
_SHARDED = "SMDATAPARALLEL_OPTIMIZE_SDP"


def _refuse_size(key: str, text: str) -> None:
    if not text.isdigit() or int(text) < _PAGE or int(text) % _PAGE:
        raise ConfigError(
            f"SMDDPBackend: {key}={text} is not a multiple of {_PAGE} bytes, without which the library would leave "
            f"all to NCCL. Try 16777216 (backend.{key}, {_BUFFERS[key]})."
        )


def _versions() -> str:
    return (
        "The newest wheel of SMDDP (2.5.0) is for Python 3.11, torch 2.4.1 and CUDA 12.1; here are "
        f"Python {platform.python_version()}, torch {torch.__version__} and CUDA {torch.version.cuda or 'none'}. "
        "Use a container of AWS that has it, or backend=nccl (backend)."
    )
