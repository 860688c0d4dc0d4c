"""torchrun's agent for one machine, with what `launch` promises of exit codes, restarts and leave-taking."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from trainer.cli import EXIT_WRONG_INPUT
from trainer.stop import EXIT_STOPPED

_FINAL = (EXIT_WRONG_INPUT, EXIT_STOPPED)
"""Exit codes after which the same start would end the same way, or a person wanted the end."""
_LEAVE_S = 600
"""How long workers that were told to stop may write their checkpoint; bare torchrun kills them after 30 s."""
_ALONE_S = 30


class Agent(LocalElasticAgent):
    """Restarts workers after crashes only, and waits for those that were told to stop."""

    def exit_code(self, otherwise: int) -> int:
        """That of the first worker, in rank order, that didn't end with 0; 0 if all did.

        Args:
            otherwise: the answer if no worker was started.
        """
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = [handlers[rank].proc.poll() for rank in sorted(handlers)]
        if not codes:
            return otherwise
        code = next((code for code in codes if code != 0), 0)
        return otherwise if code is None else shell_code(code)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(failure.exitcode in _FINAL for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *rest: Any, **more: Any) -> None:
        if isinstance(sys.exc_info()[1], SignalException):
            self._let_leave(death_sig)
        super()._shutdown(death_sig, *rest, **more)

    def _let_leave(self, told: signal.Signals) -> None:
        """Pass a signal on, and wait for checkpoints; not for long where a worker died and the others wait for it."""
        handlers = list(getattr(self._pcontext, "subprocess_handlers", {}).values())
        for handler in handlers:
            if handler.proc.poll() is None:
                handler.close(told)
        end = time.monotonic() + _LEAVE_S
        while time.monotonic() < end:
            codes = [handler.proc.poll() for handler in handlers]
            if None not in codes:
                return
            if any(code not in (None, 0, EXIT_STOPPED) for code in codes):
                end = min(end, time.monotonic() + _ALONE_S)
            time.sleep(0.05)


def shell_code(code: int) -> int:
    """128 + the signal's number where a signal ended the process."""
    return code if code >= 0 else 128 - code
