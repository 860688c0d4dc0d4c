"""What outlives a worker that has lost the machine where all meet: nothing, not even a torchrun that waits for it.

With its c10d rendezvous, torchrun asks the lost machine about others and waits for the answer as long as the system
lets it, a quarter of an hour and more; it sees neither a signal nor that its workers have ended. So the last worker
leaves somebody behind who looks whether torchrun ends by itself.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_BY_ITSELF_S = 10.0
_AFTER_SIGTERM_S = 5.0


def see_off(launcher: int) -> None:
    """Have a torchrun ended that doesn't end by itself within seconds; doesn't wait.

    Args:
        launcher: its process number; it is this process's parent, and still there.
    """
    if not hasattr(os, "pidfd_open"):
        return
    found = os.pidfd_open(launcher)  # stays this one's, whoever gets the number later
    try:
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(found), str(launcher)],
            pass_fds=[found], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        os.close(found)


def main() -> None:
    """In the process that is left behind."""
    found, launcher = int(sys.argv[1]), sys.argv[2]
    for number, patience_s in ((None, _BY_ITSELF_S), (signal.SIGTERM, _AFTER_SIGTERM_S), (signal.SIGKILL, 0.0)):
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
