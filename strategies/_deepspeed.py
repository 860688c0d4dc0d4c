"""DeepSpeed, brought in when it is chosen: quiet, on this run's device, and with compiled operators in one place."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import logging
import os
import platform
import sys
import warnings
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from strategies.base import Plan
from strategies.errors import ConfigError
from strategies.precision import Numbers

_UNTOUCHED: dict[str, Any] = {}
"""deepspeed.utils.groups, as it was when it was imported."""
_SAID: list[str] = []
"""Variables of the environment that are ours."""


def check_installed() -> None:
    """Refuse to go on without DeepSpeed.

    Raises:
        ConfigError: it isn't installed; says how to.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeedStrategy: DeepSpeed is not installed. Run pip install 'shardwright[deepspeed]', or choose "
            "strategy=fsdp_full, which cuts in the same way (strategy)."
        )


def refuse_plan(stage: int, plan: Plan) -> None:
    """What DeepSpeed can't do of a step.

    Raises:
        ConfigError: names the key.
    """
    if plan.precision.numbers is Numbers.fp64:
        raise ConfigError("DeepSpeedStrategy: DeepSpeed computes in fp32 at most. Use precision=fp32 (precision).")
    if plan.compile and stage == 3:
        raise ConfigError(
            "DeepSpeedStrategy: stage=3 gathers weights in ways that torch.compile can't follow. Use compile=false "
            "or strategy=fsdp_full, which cuts in the same way (compile, strategy)."
        )


def brought_in(device: torch.device) -> ModuleType:
    """DeepSpeed over the process group that exists already; some seconds the first time."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet = logging.getLogger("DeepSpeed")
    with unheard():
        import deepspeed
        import deepspeed.comm.comm as comm
        from deepspeed.utils import groups

    quiet.setLevel(logging.ERROR)
    if not _UNTOUCHED:
        _UNTOUCHED.update({name: copy.copy(value) for name, value in vars(groups).items() if _is_kept(name, value)})
    # Compiled while connecting, half a minute or more, and used by inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with unheard():
        if comm.cdb is None:
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            for name, older in (("all_gather", "all_gather_into_tensor"), ("reduce_scatter", "reduce_scatter_tensor")):
                newer = f"{name}_single"  # torch 2.13 warns about the names that DeepSpeed knows
                called = newer if hasattr(dist, newer) else older
                setattr(comm.cdb, f"{name}_function", functools.partial(_by_name, called))
    module: ModuleType = deepspeed
    return module


def _by_name(name: str, *args: Any, **kwargs: Any) -> Any:
    """Look it up anew each time: steps are timed by what stands under that name."""
    return getattr(dist, name)(*args, **kwargs)


def say_local_rank(rank: int) -> None:
    """DeepSpeed insists on LOCAL_RANK, which torchrun sets and other ways to start don't; until `let_go`."""
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(rank)
        _SAID.append("LOCAL_RANK")


def start_counting() -> None:
    """Number parameters and modules from 0: all ranks must number alike, whatever engines each has had before."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    (modules,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    modules[0] = 0


def forget_engines() -> None:
    """Let go of engines that have ended: stage 3 keeps each with its model and groups, for the life of the process."""
    zero = "deepspeed.runtime.zero"
    if (offload := sys.modules.get(f"{zero}.parameter_offload")) is not None:
        offload.FWD_MODULE_STACK.clear()
    if (module := sys.modules.get(f"{zero}.partitioned_param_coordinator")) is not None:
        coordinator = module.PartitionedParameterCoordinator
        noted = inspect.getclosurevars(coordinator._PartitionedParameterCoordinator__params_to_release)
        noted.nonlocals["func"].cache_clear()


def let_go() -> None:
    """Forget the process groups, which are about to be destroyed, and what used them."""
    forget_engines()
    while _SAID:
        os.environ.pop(_SAID.pop(), None)
    comm, groups = sys.modules.get("deepspeed.comm.comm"), sys.modules.get("deepspeed.utils.groups")
    if comm is not None and groups is not None:
        comm.cdb = None  # type: ignore[attr-defined]
        vars(groups).update({name: copy.copy(value) for name, value in _UNTOUCHED.items()})


def operators() -> Path:
    """Where compiled operators lie, apart by what they were compiled with and for."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    information = Path("/proc/cpuinfo")
    features = next((line for line in _lines(information) if line.startswith(("flags", "Features"))), "")
    processor = f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
    libraries = f"torch-{torch.__version__}-deepspeed-{version('deepspeed')}"
    versions = f"{libraries}-python-{sys.version_info[0]}.{sys.version_info[1]}"
    return base / "shardwright" / "operators" / f"{versions}-{processor}"


def compile_cpu_adam() -> None:
    """Have DeepSpeed's Adam for processors, compiled once for machines like this one.

    torch guards a build by a file that a killed process leaves behind, and on which the next one would wait for ever.
    This lock goes with the process that holds it, so what lies there once it is held is of the dead.

    Raises:
        ConfigError: it can't be compiled here.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder
    from filelock import FileLock

    builder, root = CPUAdamBuilder(), operators()
    folder = root / builder.name
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with FileLock(root / f"{builder.name}.lock"):
        (folder / "lock").unlink(missing_ok=True)
        finished = folder / "finished"  # else a killed build may have left a part
        if finished.exists():  # torch would compile again for another environment with the same libraries
            OpBuilder._loaded_ops[builder.name] = _loaded(builder.name, folder / f"{builder.name}.so")
            return
        if not any(folder.glob("*.so")):
            sys.stderr.write(f"compiling DeepSpeed's Adam for this processor, once, into {folder} (about a minute)\n")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
        try:
            with unheard():
                builder.load()
            finished.touch()
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if "error" in line.lower()), type(error).__name__)
            raise ConfigError(
                f"DeepSpeedStrategy: its Adam can't be compiled here: {reason.strip()}. Install a C++ compiler and "
                "ninja, or use strategy.cpu_adam=false (strategy.cpu_adam)."
            ) from error
        finally:
            if before is None:
                del os.environ["TORCH_EXTENSIONS_DIR"]
            else:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def _loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpu_adam(optimizer: Optimizer) -> Optimizer:
    """DeepSpeed's Adam with the groups and settings of torch's.

    Raises:
        ConfigError: `optimizer` isn't Adam, or has settings that DeepSpeed's doesn't know.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    unknown = [key for key in ("amsgrad", "maximize") if any(group.get(key) for group in optimizer.param_groups)]
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or unknown:
        what = f"with {unknown[0]}" if unknown else "and isn't Adam"
        raise ConfigError(
            f"DeepSpeedStrategy: cpu_adam=true stands in for torch's Adam and AdamW, and the optimizer is "
            f"{type(optimizer).__name__} {what}. Use optimizer=adamw or cpu_adam=false (strategy.cpu_adam, optimizer)."
        )
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    known = ("lr", "betas", "eps", "weight_decay")
    more = {
        key for group in optimizer.param_groups for key in group if key not in (*known, *optimizer.defaults, "params")
    }
    groups = [
        {key: group[key] for key in ("params", *known, *sorted(more)) if key in group}
        for group in optimizer.param_groups
    ]
    made: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=decoupled)
    return made


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What DeepSpeed prints and logs while it starts isn't for those who train."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _is_kept(name: str, value: object) -> bool:
    return not name.startswith("__") and (value is None or isinstance(value, dict | int))
