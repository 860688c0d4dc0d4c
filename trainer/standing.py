"""Where this process stands: what its threads are in the middle of, and the collective that it waits in."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import distributed_c10d

from trainer.bounded import within
from trainer.pulse import PULSE

_DEBUGGERS = ("pdb", "bdb", "ipdb", "pudb", "pydevd", "debugpy")
_LIBRARIES = {
    f"{os.sep}torch{os.sep}distributed{os.sep}": "torch.distributed",
    f"{os.sep}deepspeed{os.sep}comm{os.sep}": "deepspeed.comm",
    f"{os.sep}horovod{os.sep}torch{os.sep}": "horovod.torch",
}
_NOT_OURS = ("site-packages", f"{os.sep}lib{os.sep}python", "<frozen")
_LONGEST = 200


def standing(main: int) -> dict[str, Any]:
    """What other ranks want to know of this one where nothing moves, as JSON.

    Args:
        main: identifies the thread that trains.

    Returns:
        `step`, `doing`: of the pulse. `started`: collectives so far, by group; `entered`: the same of those that the
        device has come to, where the library knows. `waits`: the collective that it is in, or what else of other
        ranks it waits for; None: nothing. `at`: the line of Python. `debugged`: a person has stopped it to look.
    """
    frames = list(_frames(sys._current_frames().get(main)))
    nothing: dict[str, Any] = {}
    records = within(3.0, _records, nothing)  # asks the device, which may hang too
    return {
        "step": PULSE.step,
        "doing": PULSE.doing,
        "started": _started(),
        "entered": _entered(records),
        "waits": _collective(records) or _call(frames) or PULSE.waits_for,
        "at": _place(frames),
        "debugged": is_debugged(frames),
    }


def write_standing(folder: Path, rank: int) -> None:
    """Every thread's stack into this rank's log, and the library's record of collectives, if it keeps one, beside it.

    Args:
        folder: the run's.
        rank: of this process.
    """
    with contextlib.suppress(OSError), (folder / "logs" / f"rank-{rank}.log").open("ab", buffering=0) as log:
        threads = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        log.write(f"at step {PULSE.step}, {PULSE.doing}; threads: {threads}\n".encode())
        faulthandler.dump_traceback(log, all_threads=True)
    with contextlib.suppress(OSError):
        if found := _dumped():
            (folder / "logs" / f"collectives-rank-{rank}.json").write_bytes(found)


def is_debugged(frames: list[FrameType] | None = None) -> bool:
    """Whether a person has stopped this process, or a thread of it, to look at it."""
    with contextlib.suppress(OSError, ValueError):
        status = Path("/proc/self/status").read_text()
        if int(status.partition("TracerPid:")[2].split()[0]):
            return True
    modules = (frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames or [])
    return any(module in _DEBUGGERS for module in modules)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: list[FrameType]) -> str:
    """The innermost line that isn't a library's."""
    own = (frame for frame in frames if not any(part in frame.f_code.co_filename for part in _NOT_OURS))
    frame = next(own, frames[0] if frames else None)
    if frame is None:
        return "nowhere"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _call(frames: list[FrameType]) -> str | None:
    """The outermost function of a communication library on the stack."""
    for frame in reversed(frames):
        for part, library in _LIBRARIES.items():
            if part in frame.f_code.co_filename and frame.f_code.co_name != "wrapper":
                return f"{library}.{frame.f_code.co_name}"
    return None


def _started() -> dict[str, int]:
    """By each group's name, which is the same on all ranks of it."""
    found: dict[str, int] = {}
    with contextlib.suppress(Exception):  # groups may be taken down meanwhile
        world: Any = distributed_c10d._world
        for group in list(world.pg_map):
            with contextlib.suppress(Exception):
                found[str(world.pg_names[group])] = int(group._get_sequence_number_for_group())
    return found


def _entered(records: dict[str, Any]) -> dict[str, int]:
    told = {group: int(each["last_started_collective"]) for group, each in records.get("pg_status", {}).items()}
    return {group: count for group, count in told.items() if count >= 0}


def _records() -> dict[str, Any]:
    """What the flight recorder has; {}: there is none."""
    found: Any = json.loads(_dumped() or b"{}")
    return found if isinstance(found, dict) else {}


def _dumped() -> bytes:
    """The flight recorder's own words; NCCL's, where there is one that has recorded something."""
    library: Any = getattr(torch._C, "_distributed_c10d", None)
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if (dump := getattr(library, name, None)) is not None:
            found = bytes(dump(True, False))
            if b'"entries":[{' in found:
                return found
    return b""


def _collective(records: dict[str, Any]) -> str | None:
    """The oldest one that hasn't come to its end."""
    for entry in records.get("entries", []):
        if not entry.get("retired", True) and entry.get("state") != "completed":
            group, sizes = entry.get("process_group", ["?"]), entry.get("input_sizes", [])
            text = f"{entry.get('profiling_name')} {entry.get('collective_seq_id')} of group {group[0]}, {sizes}"
            return text[:_LONGEST]
    return None
