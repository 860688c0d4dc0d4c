"""What the dashboard shows, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

RUN = '{run=~"$run"}'
_RANK = '{run=~"$run",rank=~"$rank"}'
_STAMP = "shardwright_last_progress_timestamp_seconds"
_SAVED = "shardwright_last_checkpoint_timestamp_seconds"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Some expressions, drawn together."""

    title: str
    curves: dict[str, str]
    """Expression by legend."""
    kind: str = "timeseries"
    unit: str = "short"
    help: str = ""
    width: int = 8
    height: int = 8
    stacked: bool = False
    log: bool = False
    bad_above: float | None = None
    """Red from here on; green below."""
    bad_below: float | None = None


def _stat(title: str, expression: str, unit: str = "short", **more: Any) -> Panel:
    return Panel(title=title, curves={"{{run}}": expression}, kind="stat", unit=unit, width=4, height=4, **more)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels under one title."""

    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)


def _of_run(name: str, by: str = "max") -> str:
    """One curve for each run, of numbers that are the same on each of its ranks."""
    return f"{by} by (run) (shardwright_{name}{RUN})"


def _of_rank(name: str) -> str:
    return f"shardwright_{name}{_RANK}"


_PART = "avg by (run) (shardwright_step_{}_seconds{})"
ROWS = (
    Row(
        title="Now",
        panels=(
            _stat("Step", _of_run("step")),
            _stat("Steps left", f"{_of_run('final_step')} - {_of_run('step')}"),
            _stat(
                "Time left",
                f"({_of_run('final_step')} - {_of_run('step')}) * {_of_run('step_seconds', 'avg')}",
                "s",
                help="Steps only: evaluations and checkpoints come on top.",
            ),
            _stat(
                "Since the last step",
                f"time() - max by (run) ({_STAMP}{RUN})",
                "s",
                bad_above=300,
                help="Of a step, or a batch of an evaluation. Empty: no rank answers.",
            ),
            _stat(
                "Ranks that don't answer",
                f"max by (run) (shardwright_world_size{RUN}) - count by (run) (shardwright_world_size{RUN})",
                bad_above=1,
            ),
            _stat(
                "Since the last checkpoint",
                f"time() - max by (run) ({_SAVED}{RUN} or shardwright_start_timestamp_seconds{RUN})",
                "s",
                help="Or since the start, where this start has written none.",
                bad_above=7200,
            ),
        ),
    ),
    Row(
        title="Learning",
        panels=(
            Panel(
                title="Loss",
                curves={"{{run}}": _of_run("loss", "avg"), "{{run}} validation": _of_run("val_loss")},
                width=12,
            ),
            Panel(
                title="Validation",
                curves={"{{run}} {{__name__}}": '{__name__=~"shardwright_(ema_)?val_.+",run=~"$run",rank="0"}'},
                help="Every metric of the evaluations.",
                width=12,
            ),
            Panel(title="Learning rate", curves={"{{run}}": _of_run("learning_rate")}, unit="sci"),
            Panel(
                title="Gradient norm", curves={"{{run}}": _of_run("gradient_norm")}, help="Before clipping.", log=True
            ),
            Panel(
                title="Steps skipped",
                curves={"{{run}}": f"max by (run) (increase(shardwright_skipped_steps_total{RUN}[$__rate_interval]))"},
                help="Their gradient wasn't finite.",
                bad_above=1,
            ),
            Panel(title="Epoch", curves={"{{run}}": _of_run("epoch")}),
            Panel(title="Tokens so far", curves={"{{run}}": _of_run("consumed_tokens")}),
            Panel(title="Samples so far", curves={"{{run}}": _of_run("consumed_samples")}),
        ),
    ),
    Row(
        title="Speed",
        panels=(
            Panel(
                title="Tokens per second",
                curves={
                    "{{run}}, in steps": _of_run("tokens_per_second", "avg"),
                    "{{run}}, with evaluations, checkpoints and all else": (
                        f"max by (run) (rate(shardwright_tokens_total{RUN}[$__rate_interval]))"
                    ),
                },
                help="Of all ranks together.",
                width=12,
            ),
            Panel(
                title="Steps per second",
                curves={"{{run}}": f"max by (run) (rate(shardwright_steps_total{RUN}[$__rate_interval]))"},
                width=6,
            ),
            Panel(
                title="MFU",
                curves={"{{run}}": _of_run("mfu_ratio", "avg")},
                unit="percentunit",
                width=6,
                help="Where the device's peak is published.",
            ),
            Panel(
                title="A step, and what it is made of",
                curves={
                    "data": _PART.format("data", RUN),
                    "compute": _PART.format("compute", RUN),
                    "communication": _PART.format("communication", RUN),
                },
                unit="s",
                stacked=True,
                help="Means over the ranks. Communication: what no computation hides, where it is known; else it is "
                "in compute.",
                width=12,
            ),
            Panel(
                title="Each rank: computation and data",
                curves={"{{run}} {{rank}}": f"{_of_rank('step_compute_seconds')} + {_of_rank('step_data_seconds')}"},
                unit="s",
                help="What a rank does by itself in a step. One that lies above the others holds them up.",
                width=12,
            ),
            Panel(
                title="Each rank: waiting for others",
                curves={"{{run}} {{rank}}": _of_rank("step_communication_seconds")},
                unit="s",
                help="The rank that waits least is the one that the others wait for.",
                width=12,
            ),
            Panel(
                title="Communication, hidden or not",
                curves={
                    "{{run}}, all": f"avg by (run) (shardwright_step_all_communication_seconds{RUN})",
                    "{{run}}, not hidden": f"avg by (run) (shardwright_step_communication_seconds{RUN})",
                },
                unit="s",
                help="Means over the ranks, per step. What lies between the two goes on behind computation.",
                width=6,
            ),
            Panel(
                title="Straggle",
                curves={"{{run}}": _of_run("straggle_ratio")},
                unit="percentunit",
                help="How much longer the slowest rank works by itself than the middle one.",
                width=6,
            ),
            Panel(
                title="Each rank: since its last step",
                curves={"{{run}} {{rank}}": f"time() - {_STAMP}{_RANK}"},
                unit="s",
                width=12,
            ),
        ),
    ),
    Row(
        title="Checkpoints",
        panels=(
            Panel(
                title="Duration of the last one",
                curves={
                    "{{run}}": _of_run("last_checkpoint_duration_seconds"),
                    "{{run}}, training stood still": _of_run("last_checkpoint_stall_seconds"),
                },
                unit="s",
                width=6,
            ),
            Panel(
                title="Size of the last one",
                curves={"{{run}}": _of_run("last_checkpoint_size_bytes")},
                unit="bytes",
                width=6,
            ),
            Panel(
                title="Steps that would be lost",
                curves={"{{run}}": f"{_of_run('step')} - {_of_run('last_checkpoint_step')}"},
                width=6,
            ),
            Panel(
                title="Part of the time that training waits for them",
                curves={
                    "{{run}}": f"avg by (run) (shardwright_step_checkpoint_seconds{RUN} / "
                    f"(shardwright_step_seconds{RUN} + shardwright_step_checkpoint_seconds{RUN}))"
                },
                unit="percentunit",
                width=6,
            ),
        ),
    ),
    Row(
        title="Machines",
        panels=(
            Panel(
                title="Device memory",
                curves={
                    "{{run}} {{rank}}": _of_rank("device_memory_used_bytes"),
                    "{{run}} {{rank}} peak": _of_rank("device_memory_peak_bytes"),
                    "{{run}} size": _of_run("device_memory_size_bytes", "min"),
                },
                unit="bytes",
                help="Of the GPU: what tensors take. On CPU: resident memory, and the host's.",
            ),
            Panel(
                title="Memory of each process",
                curves={"{{run}} {{rank}}": _of_rank("process_memory_bytes")},
                unit="bytes",
            ),
            Panel(
                title="Memory left on the host",
                curves={
                    "{{run}} {{rank}}": f"shardwright_host_memory_available_bytes{_RANK} / "
                    f"shardwright_host_memory_size_bytes{_RANK}"
                },
                unit="percentunit",
                bad_below=0.05,
            ),
            Panel(
                title="Cores that each process keeps busy",
                curves={"{{run}} {{rank}}": f"rate(shardwright_process_cpu_seconds_total{_RANK}[$__rate_interval])"},
            ),
            Panel(
                title="Disk left",
                curves={"{{run}} {{rank}}": f"shardwright_disk_free_bytes{_RANK} / shardwright_disk_size_bytes{_RANK}"},
                unit="percentunit",
                help="Where the run's folder is.",
                bad_below=0.05,
            ),
            Panel(
                title="Starts and rollbacks",
                curves={
                    "{{run}} started by its launcher again": _of_run("restarts"),
                    "{{run}} rolled back": _of_run("rollbacks_total"),
                },
            ),
            Panel(
                title="Ranks",
                curves={"": f"shardwright_run_info{_RANK}"},
                kind="table",
                width=24,
            ),
        ),
    ),
)
