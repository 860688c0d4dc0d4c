"""Which moves the grid is made of: drawn from the strategies that are registered, none of which is named here."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strategies.backends import Backend, GlooBackend
from strategies.base import Strategy
from strategies.errors import ConfigError
from strategies.testing import Workers
from trainer.config import compose, made, strategy_names

SIZES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A strategy on a number of ranks."""

    strategy: str
    """The word after `strategy=`."""
    size: int

    @property
    def local_size(self) -> int:
        """Ranks of a (pretended) machine: four ranks are on two, so that strategies that mind machines have several."""
        return 2 if self.size % 2 == 0 else self.size

    def __str__(self) -> str:
        return f"{self.strategy}@{self.size}"


@dataclass(frozen=True, kw_only=True, order=True)
class Move:
    """A run that goes on somewhere else."""

    source: Place
    target: Place

    @property
    def pair(self) -> tuple[str, str]:
        """The strategies."""
        return self.source.strategy, self.target.strategy

    @property
    def kind(self) -> str:
        """`grows`, `shrinks` or `stays`: the world."""
        change = self.target.size - self.source.size
        return "stays" if change == 0 else "grows" if change > 0 else "shrinks"

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


KINDS = ("grows", "shrinks", "stays")


def refused(plugins: dict[str, Strategy], backend: Backend) -> dict[str, str]:
    """Why which of `plugins` can't run on as many ranks as this job has. For workers."""
    found = {}
    for name, plugin in plugins.items():
        try:
            plugin.connect(backend).barrier()  # nobody leaves while another still connects
        except ConfigError as error:
            found[name] = str(error)
        finally:
            plugin.close()
    return found


def places(workers: Workers, names: Sequence[str] | None = None) -> list[Place]:
    """Where runs can be: each registered strategy on each number of ranks that it doesn't refuse.

    Args:
        workers: asked to connect.
        names: of strategies, instead of all that are registered.
    """
    plugins = {name: made(compose([f"strategy={name}"]).strategy) for name in names or strategy_names()}
    found = []
    for size in SIZES[: workers.most]:
        here = [Place(strategy=name, size=size) for name in plugins]
        answers = workers.run(refused, size, plugins, GlooBackend(), local_size=here[0].local_size)
        found += [place for place in here if place.strategy not in answers[0]]
    return sorted(found)


def grid(found: Sequence[Place]) -> list[Move]:
    """Each ordered pair of strategies on a changed number of ranks, where it can be; each to the next on as many, too.

    From which number to which, and whether it grows, is decided by what was seen least so far: all of them turn up.
    """
    seen: Counter[object] = Counter()
    moves = []
    names = sorted({place.strategy for place in found})
    for number, source in enumerate(names):
        following = names[(number + 1) % len(names)]
        for target, stays in [*((name, False) for name in names), (following, True)]:
            choices = [
                move
                for start in found
                for end in found
                if (move := Move(source=start, target=end)).pair == (source, target)
                and (move.kind == "stays") == stays
                and start != end
            ]
            if choices:
                chosen = min(choices, key=lambda m: (seen[m.kind], seen[_sizes(m)], -m.target.size, -m.source.size))
                seen.update((chosen.kind, _sizes(chosen)))
                moves.append(chosen)
    return moves


def sample(moves: Sequence[Move], most: int, seed: int = 0) -> list[Move]:
    """A few moves of a grid, in which each strategy is left and entered, and each kind of move occurs."""
    left = list(moves)
    random.Random(seed).shuffle(left)
    wanted = {wish for move in moves for wish in (("from", move.pair[0]), ("to", move.pair[1]), ("kind", move.kind))}
    chosen: list[Move] = []
    met: Callable[[Move], set[tuple[str, str]]] = lambda move: {  # noqa: E731
        ("from", move.pair[0]),
        ("to", move.pair[1]),
        ("kind", move.kind),
    }
    while left and len(chosen) < most:
        best = max(left, key=lambda move: len(met(move) & wanted))
        wanted -= met(best)
        left.remove(best)
        chosen.append(best)
    return chosen


def _sizes(move: Move) -> tuple[int, int]:
    return move.source.size, move.target.size
