"""Every number of the endpoint: its name, kind and meaning. The dashboard, the alerts and the docs speak of these."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "shardwright_"

GAUGE, COUNTER = "gauge", "counter"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One number, with the same labels `run` and `rank` as all others."""

    name: str
    kind: str = GAUGE
    """A counter begins at 0 with each process, as Prometheus' `rate` expects; a gauge says how it is now."""
    help: str
    logged: str = ""
    """Its name in `metrics.jsonl`; empty: it doesn't stand there."""
    factor: float = 1.0
    """From the unit there to the base unit here."""
    always: bool = True
    """False: only where there is such a thing."""


def _logged(name: str, logged: str, help: str, *, factor: float = 1.0, always: bool = True) -> Family:  # noqa: A002
    return Family(name=f"{PREFIX}{name}", help=help, logged=logged, factor=factor, always=always)


def _gauge(name: str, help: str, *, always: bool = True) -> Family:  # noqa: A002
    return Family(name=f"{PREFIX}{name}", help=help, always=always)


def _counter(name: str, help: str) -> Family:  # noqa: A002
    return Family(name=f"{PREFIX}{name}_total", kind=COUNTER, help=help)


FAMILIES = (
    # Who this is, and whether it comes on.
    _gauge("run_info", "Always 1; the labels say strategy, world_size, device, host and version."),
    _gauge("world_size", "Ranks of the run."),
    _gauge("restarts", "How often the launcher has started the ranks again."),
    _gauge("start_timestamp_seconds", "When this process joined the run, in Unix time."),
    _gauge("last_progress_timestamp_seconds", "When this rank last took a step or evaluated a batch, in Unix time."),
    _gauge("step", "Optimizer steps of the run so far, over every start."),
    _gauge("final_step", "The step at which the run ends.", always=False),
    _gauge("saving", "1 while training waits for a checkpoint to be written, else 0."),
    # Counters: of this process.
    _counter("steps", "Optimizer steps taken by this process."),
    _counter("samples", "Samples trained on by all ranks since this process started, as of the last logged step."),
    _counter("tokens", "Tokens trained on by all ranks since this process started, as of the last logged step."),
    _counter("skipped_steps", "Steps whose gradient wasn't finite, since this process started."),
    _counter("rollbacks", "Returns to an earlier checkpoint, since this process started."),
    _counter("checkpoints", "Checkpoints completed since this process started."),
    _counter("process_cpu_seconds", "CPU time of this process."),
    # Learning.
    _logged("loss", "loss", "Training loss of the last logged step."),
    _logged("val_loss", "val_loss", "Validation loss of the last evaluation.", always=False),
    _logged("learning_rate", "lr", "Learning rate of the last logged step."),
    _logged("gradient_norm", "grad_norm", "L2 norm of the gradient before clipping, of the last logged step."),
    _logged("epoch", "epoch", "Passes over the training samples, over every start."),
    _logged("consumed_samples", "samples", "Samples trained on, over every start."),
    _logged("consumed_tokens", "tokens", "Tokens trained on, over every start."),
    # Speed: means over the steps since the last logged one.
    _logged("step_seconds", "step_s", "Duration of a step."),
    _logged("step_data_seconds", "data_s", "Of a step: waiting for data."),
    _logged("step_compute_seconds", "compute_s", "Of a step: computing, and waiting that nobody accounts for."),
    _logged(
        "step_communication_seconds",
        "communication_s",
        "Of a step: waiting for other ranks, hidden behind no computation.",
        always=False,
    ),
    _logged(
        "step_all_communication_seconds",
        "communication_total_s",
        "The same with what went on behind computation.",
        always=False,
    ),
    _logged(
        "straggle_ratio",
        "straggle",
        "How much longer the slowest rank worked by itself than the middle one.",
        always=False,
    ),
    _logged(
        "step_checkpoint_seconds",
        "checkpoint_s",
        "Waiting for checkpoints, per step; no part of its duration.",
    ),
    _logged("tokens_per_second", "tokens_per_s", "Tokens per second of all ranks.", always=False),
    _logged(
        "samples_per_second",
        "samples_per_s",
        "Samples per second of all ranks, where there are no tokens.",
        always=False,
    ),
    _logged("mfu_ratio", "mfu", "Model FLOPs utilisation, where the device's peak is published.", always=False),
    # Checkpoints.
    _gauge("last_checkpoint_step", "Step of the newest checkpoint of this process.", always=False),
    _gauge("last_checkpoint_timestamp_seconds", "When it was complete, in Unix time.", always=False),
    _gauge("last_checkpoint_duration_seconds", "From its beginning until it was complete.", always=False),
    _gauge("last_checkpoint_stall_seconds", "Of these, how long training stood still.", always=False),
    _gauge("last_checkpoint_size_bytes", "All its files, of all ranks; rank 0 says it.", always=False),
    # The machine.
    _logged(
        "device_memory_peak_bytes",
        "memory_mib",
        "Most memory that this rank has needed: tensors on its GPU; on CPU, resident.",
        factor=2.0**20,
    ),
    _gauge("device_memory_used_bytes", "The same now, as of the last logged step."),
    _gauge("device_memory_size_bytes", "Memory of the GPU; on CPU, of the host or the container."),
    _gauge("process_memory_bytes", "Resident memory of this process."),
    _gauge("host_memory_available_bytes", "Memory left on the host, or to the container."),
    _gauge("host_memory_size_bytes", "Memory of the host, or the container's limit."),
    _gauge("disk_free_bytes", "Free where the run's folder is, as of the last logged step."),
    _gauge("disk_size_bytes", "Size of that file system."),
)

BY_NAME = {family.name: family for family in FAMILIES}
_BY_LOGGED = {family.logged: family for family in FAMILIES if family.logged}
COUNTED = {
    "samples": f"{PREFIX}samples_total",
    "tokens": f"{PREFIX}tokens_total",
    "skipped": f"{PREFIX}skipped_steps_total",
}
"""Logged numbers that grow over every start -> the counters that follow their growth."""
_ONLY_COUNTED = {"skipped"}
_UNITS = (("_per_s", "_per_second", 1.0), ("_ms", "_seconds", 1e-3), ("_s", "_seconds", 1.0),
          ("_mib", "_bytes", 2.0**20), ("_gib", "_bytes", 2.0**30))  # fmt: skip
_TAKEN = {name.removesuffix("_total") for name in BY_NAME}


def exposed(logged: str) -> Family | None:
    """What a logged number becomes, also one that this file doesn't know, in base units; None: a counter covers it."""
    if logged in _ONLY_COUNTED:
        return None
    if logged in _BY_LOGGED:
        return _BY_LOGGED[logged]
    name, factor = logged, 1.0
    for suffix, unit, each in _UNITS:
        if logged.endswith(suffix):
            name, factor = logged.removesuffix(suffix) + unit, each
            break
    name = PREFIX + re.sub(r"\W", "_", name, flags=re.ASCII).removesuffix("_total")
    if name in _TAKEN:
        name = PREFIX + "logged_" + name.removeprefix(PREFIX)
    return Family(name=name, help=f"{logged}, as it was last logged.", logged=logged, factor=factor, always=False)
