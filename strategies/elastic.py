"""What lets a run go on when ranks are lost or join: its state in memory, and the way back in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor


class RanksChanged(Exception):  # noqa: N818 - nothing is wrong
    """All ranks have agreed to begin again at this step, since there are to be more of them, or fewer."""


class Elastic(ABC):
    """Of one rank of a `World` whose ranks may change.

    Args:
        commit_every: optimizer steps between commits; above 0.
    """

    def __init__(self, commit_every: int) -> None:
        self.commit_every = commit_every

    @abstractmethod
    def commit(self, step: int, note: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy in host memory, in place of the one before; not collective.

        Args:
            step: optimizer steps done.
            note: whatever else belongs to it.
            tensors: whole, and the same on every rank.
        """

    @abstractmethod
    def committed(self) -> tuple[str, dict[str, Tensor]] | None:
        """Note and tensors (on CPU) of the newest commit that any rank has from before it began again; None: there is
        none. Collective.
        """

    @abstractmethod
    def changed(self) -> bool:
        """Whether this rank was told that there are to be more ranks, or fewer; not collective."""

    @abstractmethod
    def rejoin(self, why: str) -> None:
        """Begin again among the ranks that there are by then, with the commit; from any thread.

        The process starts its command anew, so this returns only where that has led nowhere several times.

        Args:
            why: for the person at the terminal.
        """
