"""What is asked of Slurm: its own programs, and what they say as one line."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strategies.errors import ConfigError
from trainer.launch.base import State
from trainer.launch.slurm_script import Batch
from trainer.stop import EXIT_STOPPED

_ANSWER_S = 60.0
PATIENCE_S = 10.0
"""Between two questions of a sweep: every one costs the controller, which all users share."""
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_BITSTR_LEN")
"""Variables that say where the controller is; the others belong to a job in which this command runs."""

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
            "SUSPENDED", "POWER_UP_NODE")  # fmt: skip
_STATES = {
    **dict.fromkeys(_WAITING, State.waiting),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED"), State.running),
    "COMPLETED": State.finished,
    **dict.fromkeys(("CANCELLED", "PREEMPTED", "TIMEOUT", "REVOKED"), State.stopped),
    **dict.fromkeys(("FAILED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "LAUNCH_FAILED"), State.failed),
}


@dataclass(frozen=True)
class Seen:
    """What Slurm says of a job."""

    state: str
    """Slurm's word for it."""
    detail: str = ""
    """Why it waits, or where it runs."""
    exit_code: int = 0
    """As a shell has it."""
    restarts: int = 0
    name: str = ""

    @property
    def is_over(self) -> bool:
        """Nothing more comes of it by itself."""
        return self.as_state().over

    def as_state(self) -> State:
        """In this package's words."""
        state = _STATES.get(self.state, State.running)
        return State.stopped if state is State.failed and self.exit_code == EXIT_STOPPED else state


class Queue:
    """Slurm's programs, as they are found on PATH."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._answers: dict[str, tuple[float, dict[str, Seen]]] = {}
        self._tried: dict[str, float] = {}

    def refuse_none(self) -> None:
        """Ask for what submitting needs.

        Raises:
            ConfigError: it isn't here.
        """
        for program in ("sbatch", "scontrol", "scancel"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"launch: there is no {program} on this machine. Start from a login node of the cluster, or add "
                    "--dry-run and take the script there (launcher=slurm)."
                )

    def submit(self, batch: Batch) -> str:
        """Hand a script over.

        Returns:
            Its number.

        Raises:
            ConfigError: Slurm doesn't take it.
        """
        try:
            batch.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"launch: {batch.logs} can't be made: {error.strerror}. Choose another folder (run.dir)."
            ) from error
        # On the command line too, where they count more than SBATCH_* variables.
        words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in batch.options]
        said = _asked(["sbatch", "--parsable", *words], given=batch.text())
        if said.returncode:
            raise ConfigError(f"launch: sbatch refuses the job: {_reason(said.stderr)}. See what it says (launcher).")
        number = said.stdout.strip().splitlines()[-1].partition(";")[0] if said.stdout.strip() else ""
        if not number.isdecimal():
            raise ConfigError(f"launch: sbatch answers {said.stdout.strip()!r} and not with a job's number (launcher).")
        (batch.logs / f"slurm-{number}.sh").write_text(batch.text())
        return number

    def look(self, handle: str, patience_s: float = PATIENCE_S, endure_s: float = 0.0) -> Seen | None:
        """How a job does.

        Args:
            handle: `12`, or `12_3` of an array.
            patience_s: an answer as old as this will do.
            endure_s: the same where no newer one is to be had.

        Returns:
            None: Slurm knows nothing of it any more.

        Raises:
            ConfigError: it can't be asked.
        """
        number = handle.partition("_")[0]
        answered, found = self._answers.get(number, (-math.inf, {}))
        now = self._now()
        if now - max(answered, self._tried.get(number, answered)) >= patience_s:
            self._tried[number] = now
            try:
                found = self._described(number)
                self._answers[number] = (now, found)
            except ConfigError:
                if now - answered > endure_s:
                    raise
        return found.get(handle) or self._remembered(handle)

    def _described(self, number: str) -> dict[str, Seen]:
        said = _asked(["scontrol", "--oneliner", "show", "job", number])
        if said.returncode:
            if re.search(r"invalid job id", said.stdout + said.stderr, re.IGNORECASE):
                return {}
            raise ConfigError(f"launch: Slurm can't be asked: {_reason(said.stderr or said.stdout)}.")
        return read_jobs(said.stdout)

    def _remembered(self, handle: str) -> Seen | None:
        """From the accounting, where a cluster has one: the controller forgets after minutes."""
        if shutil.which("sacct") is None:
            return None
        said = _asked(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={handle}",
                       "--format=JobID,State,ExitCode"])  # fmt: skip
        for line in said.stdout.splitlines() if not said.returncode else []:
            number, _, rest = line.partition("|")
            state, _, code = rest.partition("|")
            if number == handle and state:
                return Seen(state.split()[0], exit_code=_shell_code(code))
        return None

    def stop(self, handle: str) -> None:
        """Have its processes write a checkpoint and leave, and not start again."""
        seen = self.look(handle, patience_s=0.0)
        if seen is None or seen.is_over:
            return
        # A requeue that is on its way is refused from now on.
        _asked(["scontrol", "update", f"JobId={handle}", "Requeue=0"])
        self.cancel(handle, gently=seen.as_state() is State.running)

    def cancel(self, handle: str, *, gently: bool = False) -> None:
        """End it.

        Args:
            handle: `12`, or `12_3` of an array.
            gently: only tell its processes.

        Raises:
            ConfigError: Slurm doesn't let this user.
        """
        said = _asked(["scancel", *(["--signal=TERM"] if gently else []), handle])
        if said.returncode and not re.search(r"invalid job id|already complet", said.stderr, re.IGNORECASE):
            raise ConfigError(f"launch: scancel refuses: {_reason(said.stderr)}.")


def read_jobs(text: str) -> dict[str, Seen]:
    """What `scontrol --oneliner show job` says: handle -> job."""
    found: dict[str, Seen] = {}
    for line in text.splitlines():
        fields: dict[str, str] = {}
        for name, value in re.findall(r"(?<!\S)(\w+)=(\S*)", line):
            fields.setdefault(name, value)  # what comes later may be a user's comment
        if "JobState" not in fields:
            continue
        state = fields["JobState"]
        why = fields.get("Reason", "None") if _STATES.get(state) is State.waiting else fields.get("NodeList", "")
        seen = Seen(
            state,
            detail="" if why in ("None", "(null)") else why,
            exit_code=_shell_code(fields.get("ExitCode", "")),
            restarts=int(fields.get("Restarts", "0") or 0),
            name=fields.get("JobName", ""),
        )
        array, indices = fields.get("ArrayJobId"), fields.get("ArrayTaskId", "")
        handles = [f"{array}_{index}" for index in members(indices)] if array else [fields["JobId"]]
        found |= dict.fromkeys(handles, seen)
    return found


def members(indices: str) -> list[int]:
    """Of an array: `1-3,7%2` is 1, 2, 3, 7."""
    found: list[int] = []
    for part in indices.partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            found += range(first, last + 1, int(match[3] or 1))
    return found


def _shell_code(text: str) -> int:
    """Of `75:0`: the exit code, and the signal that ended it."""
    code, _, number = text.partition(":")
    if number.isdecimal() and int(number):
        return 128 + int(number)
    return int(code) if code.isdecimal() else 0


def _asked(words: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # the numbers of a large array in full
    if "SLURM_JOB_ID" in variables:
        variables = {name: value for name, value in variables.items() if not _of_a_job(name)}
    try:
        return subprocess.run(
            words, input=given, capture_output=True, text=True, timeout=_ANSWER_S, env=variables, check=False,
            start_new_session=True,  # a Ctrl-C is for this program, which asks what is meant
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError(f"launch: there is no {words[0]} on this machine any more (launcher=slurm).") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"launch: {words[0]} gives no answer within {_ANSWER_S:.0f} s. Is Slurm up?") from error


def _of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in _KEPT


def _reason(text: str) -> str:
    lines = [
        re.sub(r"^(slurm_\w+ error|\w+: error|\w+): +", "", line).strip() for line in text.splitlines() if line.strip()
    ]
    return " ".join(lines).rstrip(".") or "it doesn't say why"
