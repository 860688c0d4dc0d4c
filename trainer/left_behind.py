"""What outlives a worker that has lost the machine where all meet: nothing, not even a torchrun that waits for it.

With its c10d rendezvous, torchrun asks the lost machine about others and waits for the answer as long as the system
lets it, a quarter of an hour and more; it sees neither a signal nor that its workers have ended. So the last worker
leaves somebody behind who looks whether torchrun ends by itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path


def see_off(launcher: int, by_itself_s: float = 10.0, after_sigterm_s: float = 5.0) -> None:
    """Have a torchrun ended that doesn't end by itself within seconds; doesn't wait.

    Args:
        launcher: its process number; it is this process's parent, and still there.
        by_itself_s: how long it may take to see that its workers are gone.
        after_sigterm_s: how long it may take after a signal, before it is killed.
    """
    if not hasattr(os, "pidfd_open"):
        return
    found = os.pidfd_open(launcher)  # stays this one's, whoever gets the number later
    try:
        os.set_inheritable(found, True)
        words = [sys.executable, "-I", "-S", __file__, *map(str, (found, launcher, by_itself_s, after_sigterm_s))]
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
        os.posix_spawn(words[0], words, os.environ, file_actions=quiet, setsid=True)
    finally:
        os.close(found)


def main() -> None:
    """In the process that is left behind."""
    found, launcher = int(sys.argv[1]), sys.argv[2]
    by_itself_s, after_sigterm_s = map(float, sys.argv[3:])
    for number, patience_s in ((None, by_itself_s), (signal.SIGTERM, after_sigterm_s), (signal.SIGKILL, 0.0)):
        if number is not None:
            if _living_children(launcher):  # it goes on with new workers
                return
            signal.pidfd_send_signal(found, number)
        if select.select([found], [], [], patience_s)[0]:
            return


def _living_children(pid: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if parent == pid and state != "Z":
            return True
    return False


if __name__ == "__main__":
    main()
