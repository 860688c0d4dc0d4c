"""What is to go wrong, as data: a pure function of a seed, and JSON that gives the same again."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PLAN = "SHARDWRIGHT_FAULTS"
"""Environment variable: the faults of a start, as JSON."""
LOG = "SHARDWRIGHT_FAULTS_LOG"
"""Environment variable: file that gets a JSON line for each fault, just before it strikes."""

PHASES = {
    "starting": 4.0,
    "tokenising": 0.1,
    "running": 0.7,
    "all_reduce": 0.008,
    "evaluation": 0.04,
    "staging": 0.001,
    "writing": 0.03,
    "publishing": 0.02,
    "sweeping": 0.01,
}
"""Seconds that each takes in the small job of `victim.py`, about; a fault's delay is a fraction of it.

`starting` begins with the script, `running` with the first step; these two last until the end. `all_reduce` is the
backward pass, in which gradients are reduced. `staging` is entered twice by an asynchronous save (choosing, copying).
"""
SAVE = ("staging", "writing", "publishing", "sweeping")
"""The phases of a save."""
SIGNALS = ("kill", "term", "freeze")
"""Kinds that send a signal to their victim."""
KINDS = (*SIGNALS, "full", "limit", "error", "memory", "nan", "slow")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    kind: str = "kill"
    """`kill`, `term`: SIGKILL, SIGTERM to the victim. `freeze`: SIGSTOP, and SIGCONT after `seconds`.
    `full`: checkpoint files take `num_bytes` more, then ENOSPC; `limit`: the same by RLIMIT_FSIZE, per file.
    `error`, `memory`: RuntimeError, MemoryError. `nan`: this backward pass gives NaN gradients (all_reduce only).
    `slow`: `seconds` longer, this time and from then on."""
    victim: str = "rank 0"
    """`rank N` or `launcher`: who gets the signal. All other kinds befall the witness."""
    witness: int = 0
    """The rank whose phase is meant."""
    phase: str = "running"
    occurrence: int = 1
    """Which time this rank enters the phase, counted from 1 in each start."""
    delay_s: float = 0.0
    """From entering the phase until the signal; a phase that ends earlier gets it as it ends."""
    life: int = 0
    """How often the launcher had restarted the workers before."""
    seconds: float = 0.0
    num_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.phase not in PHASES:
            raise ValueError(f"Fault: kind={self.kind!r}, phase={self.phase!r}. Kinds: {KINDS}; phases: {(*PHASES,)}.")


def to_json(faults: Sequence[Fault]) -> str:
    """One line."""
    return json.dumps([asdict(fault) for fault in faults])


def from_json(text: str) -> list[Fault]:
    """The way back."""
    return [Fault(**entry) for entry in json.loads(text)]


def environment_of(faults: Sequence[Fault], log: Any) -> dict[str, str]:
    """Variables for a process that calls `kit.from_environment()`."""
    return {PLAN: to_json(faults), LOG: str(log)}


def planned() -> list[Fault]:
    """The faults of this process's start, from its environment."""
    return from_json(os.environ.get(PLAN) or "[]")


def victims(processes: int) -> list[str]:
    """Whom campaigns strike, in turn."""
    return [*(f"rank {rank}" for rank in range(processes)), "launcher"]


def kills(seed: int, count: int, processes: int = 2) -> list[Fault]:
    """SIGKILLs: each rank and the launcher in turn; two in five in the phases of a save, the rest anywhere."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        victim = victims(processes)[number % (processes + 1)]
        phase = _phase(draw, number)
        found.append(_signal(draw, "kill", victim, phase, processes))
    return found


def _phase(draw: random.Random, number: int) -> str:
    turn = number % 5
    if turn in (1, 3):
        return draw.choice(SAVE)
    if turn == 4:
        return draw.choice(("all_reduce", "evaluation", "starting", "tokenising"))
    return "running"


def terms(seed: int, count: int, processes: int = 2) -> list[Fault]:
    """SIGTERMs once the loop listens: each rank and the launcher in turn, anywhere."""
    draw = random.Random(seed)
    phases = ("running", "running", "writing", "evaluation", "all_reduce")
    return [
        _signal(draw, "term", victims(processes)[number % (processes + 1)], phases[number % len(phases)], processes)
        for number in range(count)
    ]


def deaths(seed: int, count: int, lives: int = 3, processes: int = 2) -> list[list[Fault]]:
    """For each try one SIGKILL of some rank in each of `lives` lives of one launch."""
    draw = random.Random(seed)
    phases = ("running", "all_reduce", "evaluation", *SAVE)
    return [
        [
            _signal(draw, "kill", f"rank {draw.randrange(processes)}", draw.choice(phases), processes, life)
            for life in range(lives)
        ]
        for _ in range(count)
    ]


def _signal(draw: random.Random, kind: str, victim: str, phase: str, processes: int, life: int = 0) -> Fault:
    witness = int(victim.removeprefix("rank ")) if victim.startswith("rank ") else draw.randrange(processes)
    often = {"all_reduce": 12, "writing": 3, "publishing": 3, "sweeping": 3, "staging": 4}.get(phase, 1)
    return Fault(
        kind=kind,
        victim=victim,
        witness=0 if phase == "tokenising" else witness,  # where one rank works for all
        phase=phase,
        occurrence=draw.randint(1, often),
        delay_s=round(draw.random() * PHASES[phase], 5),
        life=life,
    )
