"""The batch script of a job: what Slurm is asked for, and what runs on the first node and in each process."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.stop import EXIT_STOPPED, EXIT_WRONG_INPUT

Option = tuple[str, str | None]
"""Long name without dashes, and value."""

_RANKS = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE TORCHELASTIC_RUN_ID"
_MEETING = "MASTER_ADDR MASTER_PORT"
_FOLLOW_S = 30
"""How long the processes that a failed one leaves behind may take to say why and to end by themselves."""
_TOLD_EARLY = 128 + 10
"""Ended by SIGUSR1, while it was still starting."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str
    folder: Path
    words: tuple[str, ...]
    """For the training script."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is submitted: one run, or several as an array."""

    name: str
    runs: Sequence[Run]
    array: bool
    logs: Path
    """Folder of Slurm's log."""
    options: Sequence[Option]
    """Of sbatch."""
    srun: Sequence[Option]
    script: Path
    python: str
    here: Path
    """Where the job works."""
    setup: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int
    """Of each node."""
    cpus_per_process: int | None = None
    grace_s: int
    max_requeues: int

    @property
    def log(self) -> str:
        """Slurm's pattern for it."""
        return f"{str(self.logs).replace('%', '%%')}/slurm-{'%A_%a' if self.array else '%j'}.log"

    def log_of(self, handle: str) -> Path:
        """Where the log of a submitted job lies: `12`, or `12_3` of an array."""
        return self.logs / f"slurm-{handle}.log"

    def text(self) -> str:
        """The whole script."""
        return "\n".join([*self._head(), *self._begin(), *self._words(), *self._set_up(), *self._end()]) + "\n"

    def _head(self) -> list[str]:
        lines = ["#!/bin/bash", "# Made by `shardwright launch launcher=slurm`. Slurm needs the log's folder before:"]
        lines += [f"# mkdir -p {shlex.quote(str(self.logs))}"]
        return lines + [f"#SBATCH {directive(option)}" for option in self.options]

    def _begin(self) -> list[str]:
        return [
            "",
            f"logs={_quoted(self.logs)}",
            f"cd -- {_quoted(self.here)} || exit {EXIT_WRONG_INPUT}",
            "restarts=${SLURM_RESTART_COUNT:-0} time_is_up='' cancelled='' step=''",
            "trap 'time_is_up=1; kill -USR1 \"$step\" 2> /dev/null || :' USR1 # srun passes it on to every process",
            "trap 'cancelled=1' TERM # a job that was taken back would start again, if it were asked to",
            "# An array's number alone would mean all of its jobs.",
            "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-$SLURM_JOB_ID}",
            'echo "--- $(date -u +%FT%TZ) job $job on $SLURM_JOB_NODELIST, started again $restarts times"',
            'fail() { echo "launch: $1" >&2; exit ' + f"{EXIT_WRONG_INPUT}; }}",
            'mkdir -p "$logs" || fail "$logs can\'t be written here; is it on a disk that all nodes share? (run.dir)"',
            f"if ((restarts > {self.max_requeues})); then",
            f'    echo "launch: started again more than {self.max_requeues} times (launcher.max_requeues)." >&2',
            "    exit 1",
            "fi",
        ]

    def _words(self) -> list[str]:
        if not self.array:
            return ["", *_array("words", self.runs[0].words)]
        lines = ["", "case $SLURM_ARRAY_TASK_ID in"]
        for index, run in enumerate(self.runs):
            lines += [f"{index}) # {run.name}", *(f"    {line}" for line in _array("words", run.words)), "    ;;"]
        return [*lines, '*) fail "there is no job $SLURM_ARRAY_TASK_ID." ;;', "esac"]

    def _set_up(self) -> list[str]:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.setup:
            lines += ["set -eE", "trap 'fail \"the set-up failed at: $BASH_COMMAND (launcher.setup).\"' ERR"]
            lines += [*self.setup, "trap - ERR", "set +eE"]
        threads = str(self.cpus_per_process or f"$(( $(nproc) > {self.processes} ? $(nproc) / {self.processes} : 1 ))")
        lines += [
            f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"',
            f"export SHARDWRIGHT_GRACE_S={self.grace_s}",
            'export SHARDWRIGHT_ENDS="$logs/ended-$SLURM_JOB_ID-$restarts"',
        ]
        return ["", *lines]

    def _end(self) -> list[str]:
        given = set(self.environment)
        unset = f"{_RANKS} {_MEETING}" if not given & set(_MEETING.split()) else _RANKS
        return [*_WORKER.format(unset=unset, stopped=EXIT_STOPPED, follow=_FOLLOW_S).splitlines(), *self._step()]

    def _step(self) -> list[str]:
        options = [shlex.quote(word) for word in map(_long, self.srun)]
        command = f'sh -c "$worker" worker {shlex.quote(self.python)} -u {_quoted(self.script)} "${{words[@]}}" &'
        codes = {"wrong": EXIT_WRONG_INPUT, "stopped": EXIT_STOPPED, "early": _TOLD_EARLY}
        return [
            "",
            "options=(",
            *(f"    {option}" for option in options),
            ")",
            "if [[ -d /opt/sagemaker_cluster ]]; then # SageMaker HyperPod replaces a broken node and repeats the step",
            "    options+=(--auto-resume=1)",
            "fi",
            *_STEP.format(command=command, **codes).splitlines(),
            *_END.format(most=self.max_requeues, **codes).splitlines(),
        ]


def directive(option: Option) -> str:
    """An option as sbatch reads it from a script: between quotes, in which it knows backslashes."""
    name, value = option
    if value is None or re.fullmatch(r"[\w.,:;=@%+*/|&()\[\]-]+", value):
        return _long(option)
    escaped = re.sub(r'([\\"])', r"\\\1", value)
    return f'--{name}="{escaped}"'


def _long(option: Option) -> str:
    name, value = option
    return f"--{name}" if value is None else f"--{name}={value}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _array(name: str, words: Sequence[str]) -> list[str]:
    return [f"{name}=(", *(f"    {shlex.quote(word)}" for word in words), ")"]


# One per process, inside of the container where there is one. srun's own --wait counts from whichever process ends
# first, also in good order, and --kill-on-bad-exit kills the others at once, before they have said why: so a failed
# process stays for a while, and one that has stopped in order is no failure.
_WORKER = """
worker='
unset {unset} # of another launcher, or of a hook of the container
trap : USR1 TERM INT # these are for the process below; this shell waits for its end
"$@"
code=$?
if [ $code -ne 0 ]; then : > "$SHARDWRIGHT_ENDS.$code"; fi
if [ $code -eq 0 ] || [ $code -eq {stopped} ]; then exit 0; fi
if [ "$SLURM_STEP_NUM_TASKS" -gt 1 ]; then sleep {follow}; fi # the others say why, and end by themselves
exit $code
'"""

_STEP = """
code={early}
if [[ ! $time_is_up ]]; then
    srun "${{options[@]}}" {command}
    step=$!
    while wait "$step"; code=$?; ((code > 128)) && kill -0 "$step" 2> /dev/null; do :; done
fi
for noted in 1 {wrong}; do # srun says 137 where it ended the others
    if ((code)) && [[ -e $SHARDWRIGHT_ENDS.$noted ]]; then code=$noted; fi
done
if ((! code)) && [[ -e $SHARDWRIGHT_ENDS.{stopped} ]]; then code={stopped}; fi
rm -f "$SHARDWRIGHT_ENDS".*"""

_END = """
go_on() {{
    if [[ $cancelled ]]; then
        return
    elif ((restarts >= {most})); then
        echo "launch: $1; not again, after {most} times (launcher.max_requeues)." >&2
    elif scontrol requeue "$job"; then
        echo "launch: $1; the job waits to go on"
    fi
}}
if [[ $time_is_up ]] && ((code == {stopped} || code == {early})); then
    code={stopped}
    go_on "the time is up"
elif ((code == {stopped})) && [[ $(scontrol --oneliner show job "$job") == *" PreemptTime=2"* ]]; then
    # Slurm requeues a job that stays until the end of its grace, but not one that has left in good order.
    go_on "a job of higher priority takes its place"
elif ((code && code != {wrong} && code != {stopped} && SLURM_JOB_NUM_NODES > 1)); then
    # Slurm takes minutes to miss a node, and would take this for the job's own failure.
    alone=(--overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    timeout 120 srun "${{alone[@]}}" true || go_on "a node doesn't answer"
fi
exit $code"""
