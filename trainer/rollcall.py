"""Asking all ranks where they stand when nothing moves any more, and who it is that the others wait for."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Answer = Mapping[str, Any]
"""A rank's `standing`, with `idle_s`, its `host`, and `stopped`: ranks of its machine that SIGSTOP holds."""

_NAMED = 4
"""Ranks that are spoken of one by one."""


@dataclass
class _Heard:
    """The newest that a rank said."""

    text: bytes
    at: float
    """When it began to say so."""
    is_new: bool = False
    """It was said to this question, and not to an earlier one."""

    @property
    def answer(self) -> Answer | None:
        found: Answer | None = json.loads(self.text)[1] if self.is_new else None
        return found


class RollCall:
    """One rank asks; all that can answer do so at every look, until the question is withdrawn.

    Args:
        store: of all ranks, through a connection of the caller's own.
        prefix: of the keys.
        rank: of this process.
        size: how many there are.
        silent_s: a rank that says nothing new for so long, while it is asked, doesn't answer.
        now: a clock in seconds.
    """

    def __init__(
        self,
        store: Any,
        prefix: str,
        rank: int,
        size: int,
        *,
        silent_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._asker, self._keys = f"{prefix}/asks", [f"{prefix}/stands/{each}" for each in range(size)]
        self._rank, self._silent_s, self._now = rank, silent_s, now
        self._count = 0
        self._asks_since: float | None = None
        self._heard: dict[int, _Heard] = {}

    def is_on(self) -> bool:
        """Somebody asks."""
        return bool(self._store.check([self._asker]))

    def answer(self, answer: Answer) -> None:
        """Say where this rank stands; anew each time, so that it is seen to live."""
        self._count += 1
        self._store.set(self._keys[self._rank], json.dumps([self._count, answer]))

    def ask(self) -> bool:
        """Whether this rank is the one who asks: the first, or the next one where that one doesn't answer itself."""
        mine, asker = str(self._rank), self._store.compare_set(self._asker, "", str(self._rank)).decode()
        if asker == mine:
            self._asks_since = self._asks_since or self._now()
            return True
        self._listen([int(asker)])
        heard = self._heard.get(int(asker))
        if heard is not None and self._now() - heard.at > self._silent_s:
            self._store.compare_set(self._asker, asker, mine)
        return False

    def withdraw(self) -> None:
        """Something moves again."""
        if self._asks_since is not None:
            self._asks_since, self._heard = None, {}
            self._store.delete_key(self._asker)

    def hear(self) -> dict[int, Answer | None] | None:
        """What each rank says; None for one that doesn't answer. None altogether: not all have had time to."""
        assert self._asks_since is not None
        self._listen(range(len(self._keys)))
        now = self._now()
        stopped = {rank for heard in self._heard.values() for rank in (heard.answer or {}).get("stopped", ())}
        found: dict[int, Answer | None] = {}
        for rank in range(len(self._keys)):
            heard = self._heard.get(rank)
            found[rank] = None if heard is None or rank in stopped else heard.answer
            if found[rank] is None and rank not in stopped and now - self._asks_since < self._silent_s:
                return None
            if heard is not None and now - heard.at >= self._silent_s:
                found[rank] = None
        return found

    def _listen(self, ranks: Iterable[int]) -> None:
        ranks = list(ranks)
        if not self._store.check([self._keys[rank] for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([self._keys[rank]])]
        texts = self._store.multi_get([self._keys[rank] for rank in ranks]) if ranks else []
        for rank, text in zip(ranks, texts, strict=True):
            heard = self._heard.get(rank)
            if heard is None or heard.text != text:
                self._heard[rank] = _Heard(text, self._now(), is_new=heard is not None)


def missing(answers: Mapping[int, Answer | None]) -> list[int]:
    """The ranks that the others wait for; all or none of them: nobody can be told from the rest."""
    unheard = [rank for rank, answer in answers.items() if answer is None]
    if unheard:
        return unheard
    known = {rank: answer for rank, answer in answers.items() if answer is not None}
    for kind in ("started", "entered"):
        if behind := _behind({rank: answer.get(kind, {}) for rank, answer in known.items()}):
            return behind
    busy = [rank for rank, answer in known.items() if answer["waits"] is None]
    if 0 < len(busy) < len(known):
        return busy
    last = min(answer["step"] for answer in known.values())
    return [rank for rank, answer in known.items() if answer["step"] == last]


def _behind(counts: Mapping[int, Mapping[str, int]]) -> list[int]:
    """Ranks that have come to fewer collectives of some group than another rank of it."""
    most: dict[str, int] = {}
    for mine in counts.values():
        for group, count in mine.items():
            most[group] = max(count, most.get(group, count))
    return [rank for rank, mine in counts.items() if any(count < most[group] for group, count in mine.items())]


def words(answers: Mapping[int, Answer | None], hosts: Mapping[int, str]) -> str:
    """Who is missing, where they are, and what the others wait in; for one line."""
    if len(answers) == 1:
        [(rank, answer)] = answers.items()
        return _each({rank: f"is {_standing(answer)}"}, hosts)
    found = missing(answers)
    if 0 < len(found) < len(answers):
        others = [answer for rank, answer in answers.items() if rank not in found]
        return f"{_missing_ones(found, answers, hosts)}; {_waiting(others)}"
    places = {rank: _standing(answer) for rank, answer in list(answers.items())[:_NAMED]}
    return f"no rank is behind the others: {_each(places, hosts)}{_more(answers)}"


def _missing_ones(ranks: Sequence[int], answers: Mapping[int, Answer | None], hosts: Mapping[int, str]) -> str:
    stopped = {rank for answer in answers.values() if answer is not None for rank in answer["stopped"]}
    told = {}
    for rank in ranks[:_NAMED]:
        answer = answers[rank]
        if rank in stopped:
            told[rank] = "is stopped (SIGSTOP)"
        elif answer is None:
            told[rank] = "doesn't answer (stopped, stuck, or its machine is)"
        else:
            told[rank] = f"is missing there, and is {_standing(answer)}"
    return _each(told, hosts) + _more(ranks)


def _waiting(others: Sequence[Answer | None]) -> str:
    told = Counter(_standing(answer) for answer in others if answer is not None)
    if not told:
        return "nobody else answers"
    [(most, count)] = told.most_common(1)
    who = "the other rank is" if len(others) == 1 else f"{count} of the {len(others)} others are"
    return f"{who} {most}"


def _standing(answer: Answer | None) -> str:
    if answer is None:
        return "silent"
    where = f"in {answer['doing']} after step {answer['step']}"
    return f"{where}, waiting in {answer['waits']}" if answer["waits"] else f"{where}, at {answer['at']}"


def _each(told: Mapping[int, str], hosts: Mapping[int, str]) -> str:
    return ", ".join(f"rank {rank} ({hosts.get(rank, 'host unknown')}) {text}" for rank, text in told.items())


def _more(ranks: Sequence[int] | Mapping[int, Any]) -> str:
    return f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
